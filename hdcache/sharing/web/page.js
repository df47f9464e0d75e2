"use strict";
// The look inside a store, and buttons that copy commands. Texts of stores are set as text, never as markup.

for (const pre of document.querySelectorAll(".command pre")) {
  const button = document.createElement("button");
  button.className = "copy";
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const text = pre.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      // Not on localhost nor https: leave it selected for the keyboard.
      getSelection().selectAllChildren(pre.querySelector("code"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  pre.append(button);
}

const look = document.getElementById("look");
const choices = look ? JSON.parse(look.dataset.choices) : [];
if (look && choices.length) {
  look.hidden = false;
  startLook();
} else if (look) {
  document.getElementById("no-look").hidden = false;
}

function startLook() {
  const field = (name) => look.querySelector(`[name="${name}"]`);
  const say = (name, text) => { look.querySelector(`[data-say="${name}"]`).textContent = text; };
  const panels = look.querySelector(".panels");
  const canvas = look.querySelector("canvas");
  const MEANINGS = {
    qk: "Queries with keys: what its attention looks at.",
    vv: "Values with values: which tokens carry the same content.",
    qq: "Queries with queries: which tokens ask for the same.",
    kk: "Keys with keys: which tokens answer to the same.",
    cosine: "Cosine similarity of its features with those of all others.",
  };
  const LABELS = { qk: "Q-K", vv: "V-V", qq: "Q-Q", kk: "K-K", cosine: "cosine" };
  const STOPS = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];
  const asked = new URLSearchParams(location.search);
  const state = { token: null, facts: null, kind: asked.get("kind"), turn: 0, drawn: 0 };

  function fill(select, values, wanted, label = String) {
    select.replaceChildren(...values.map((value) => {
      const option = document.createElement("option");
      option.value = value;
      option.textContent = label(value);
      return option;
    }));
    if (values.map(String).includes(wanted)) select.value = wanted;
    select.disabled = values.length < 2;
  }

  const teacher = () => choices.find((one) => one.name === field("teacher").value);
  const place = () => ({
    teacher: teacher().name, tap: field("tap").value, view: field("view").value, row: field("row").value,
  });

  async function ask(what, values) {
    const answer = await fetch(`/look/${what}/${look.dataset.store}?${new URLSearchParams(values)}`);
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  }

  function trouble(text) {
    say("trouble", text);
    look.querySelector('[data-say="trouble"]').hidden = !text;
  }

  function show(image, address, text) {
    image.hidden = !address;
    image.alt = text;
    if (address) image.src = address; else image.removeAttribute("src");
  }

  function busy(on) {
    if (on) panels.setAttribute("aria-busy", "true"); else panels.removeAttribute("aria-busy");
  }

  // What was seen before must not stand beside a fault as if it belonged to it.
  function fail(error) {
    trouble(error.message);
    state.facts = null;
    for (const name of ["picture", "map", "under"]) show(field(name), "", "");
    for (const name of ["sample", "facts", "crop", "why", "nomap", "relation", "low", "high"]) say(name, "");
    look.querySelector('[data-say="logits"]').replaceChildren();
    draw([], null);
    canvas.setAttribute("aria-label", "");
    for (const one of look.querySelectorAll(".mark")) one.style.display = "none";
    busy(false);
  }

  async function changeRow() {
    const turn = ++state.turn;
    state.drawn++; // what is on its way belongs to the row before
    const row = field("row");
    row.value = Math.min(Math.max(0, Math.trunc(Number(row.value)) || 0), Number(row.max));
    field("previous").disabled = row.value === "0";
    field("next").disabled = row.value === row.max;
    busy(true);
    const picture = ask("image", { view: field("view").value, row: row.value, slots: teacher().slots });
    picture.catch(() => {});
    try {
      const facts = await ask("row", place());
      if (turn !== state.turn) return;
      trouble(facts.failed ? `This row failed when it was extracted: ${facts.failed}` : "");
      state.facts = facts;
      describe(facts);
      const seen = await picture;
      if (turn !== state.turn) return;
      const text = `${facts.sample} under view ${field("view").value}`;
      show(field("picture"), seen.image, text);
      show(field("under"), facts.map ? seen.image : "", "");
      say("why", seen.image ? "" : seen.why);
    } catch (error) {
      if (turn === state.turn) fail(error);
      return;
    }
    await relate();
  }

  function describe(facts) {
    const [rows, columns] = facts.grid;
    panels.classList.toggle("strip", facts.slots > 1);
    for (const panel of panels.querySelectorAll(".panel")) {
      panel.style.aspectRatio = `${facts.slots * columns} / ${rows}`;
    }
    say("sample", facts.sample);
    say("facts", `${facts.label ? `class ${facts.label} · ` : ""}row ${facts.row.toLocaleString()} of ${facts.rows.toLocaleString()}`);
    const [left, top, width, height] = facts.box;
    const clip = facts.frames.length ? ` Frames ${facts.frames[0]} to ${facts.frames.at(-1)}.` : "";
    say("crop", facts.source[0] ? `${width} × ${height} of ${facts.source[0]} × ${facts.source[1]} pixels, from (${left}, ${top})${facts.flip ? ", flipped" : ""}.${clip}` : "");
    show(field("map"), facts.map, `Map of ${field("tap").value}: ${rows} by ${columns} tokens, coloured by their principal components`);
    say("nomap", facts.map ? "" : facts.failed ? "failed" : `${field("tap").value} has no tokens to map`);
    fill(field("kind"), facts.kinds, state.kind, (kind) => LABELS[kind]);
    const heads = Array.from({ length: facts.heads }, (_, head) => head);
    fill(field("head"), ["mean", ...heads], field("head").value || asked.get("head"), (head) => head === "mean" ? `mean of ${facts.heads}` : `${head}`);
    field("class_token").hidden = !(facts.class_token && facts.kinds.length);
    const count = facts.slots * rows * columns;
    if (state.token === null) state.token = asked.has("token") ? Number(asked.get("token")) : Math.floor(rows / 2) * columns + Math.floor(columns / 2);
    if (!(state.token >= -1 && state.token < count)) state.token = 0;
    if (state.token === -1 && !facts.class_token) state.token = 0;
    if (facts.visible && state.token >= 0 && !facts.visible.includes(state.token)) state.token = nearest(facts, state.token);
    const list = look.querySelector('[data-say="logits"]');
    list.replaceChildren(...facts.logits.map(([number, share]) => {
      const item = document.createElement("li");
      const meter = document.createElement("meter");
      meter.value = share;
      meter.textContent = share;
      item.append(`output ${number}`, meter, `${(100 * share).toFixed(1)} %`);
      return item;
    }));
  }

  function nearest(facts, token) {
    return facts.visible.reduce((best, one) => Math.abs(one - token) < Math.abs(best - token) ? one : best);
  }

  async function relate() {
    const facts = state.facts;
    const turn = ++state.drawn;
    const kind = field("kind").value;
    const usable = facts && facts.kinds.length && !facts.failed;
    field("head").disabled = !usable || kind === "cosine" || facts.heads < 2;
    field("class_token").setAttribute("aria-pressed", String(state.token === -1));
    mark(usable ? state.token : -1);
    busy(usable);
    if (!usable) {
      canvas.setAttribute("aria-label", "");
      draw([], facts);
      for (const name of ["relation", "low", "high"]) say(name, "");
      return;
    }
    const values = { ...place(), token: state.token, kind, head: field("head").value };
    history.replaceState(null, "", `?${new URLSearchParams(values)}`);
    try {
      const found = await ask("relation", values);
      if (turn !== state.drawn || facts !== state.facts) return;
      paint(found, kind, facts);
    } catch (error) {
      if (turn === state.drawn) fail(error);
      return;
    }
    busy(false);
  }

  function paint(found, kind, facts) {
    const known = found.values.filter((value) => value !== null);
    const high = Math.max(...known);
    const low = kind === "cosine" ? Math.min(...known) : 0;
    const share = (value) => high > low ? (value - low) / (high - low) : 0;
    // Most of a softmax row is small: its root can be told from black.
    draw(found.values.map((value) => value === null ? null : kind === "cosine" ? share(value) : Math.sqrt(share(value))), facts);
    const columns = facts.grid[1], cells = facts.grid[0] * columns;
    const best = found.values.indexOf(high);
    const where = (token) => token < 0 ? "the class token" : `row ${Math.floor(token % cells / columns) + 1}, column ${token % columns + 1}${facts.slots > 1 ? `, slot ${Math.floor(token / cells) + 1}` : ""}`;
    const rest = found.prefix.reduce((sum, value) => sum + value, 0);
    const prefix = !found.prefix.length ? "" : kind === "cosine" ? ` With the class token: ${found.prefix[0].toFixed(2)}.` : ` Class and register tokens have ${(100 * rest).toFixed(1)} %.`;
    say("relation", `${MEANINGS[kind]}${prefix}`);
    const text = (value) => kind === "cosine" ? value.toPrecision(3) : `${(100 * value).toPrecision(2)} %`;
    say("low", text(low));
    say("high", text(high));
    canvas.setAttribute("aria-label", `${LABELS[kind]} relation of ${where(state.token)}: strongest at ${where(best)}, ${text(high)}`);
  }

  function draw(shares, facts) {
    const [rows, columns] = facts ? facts.grid : [1, 1];
    const slots = facts ? facts.slots : 1;
    canvas.width = slots * columns;
    canvas.height = rows;
    const pen = canvas.getContext("2d");
    const pixels = pen.createImageData(canvas.width, canvas.height);
    const opacity = field("under").hidden ? 1 : 0.8;
    shares.forEach((share, token) => {
      if (share === null) return;
      const slot = Math.floor(token / (rows * columns)), cell = token % (rows * columns);
      const at = 4 * (Math.floor(cell / columns) * canvas.width + slot * columns + cell % columns);
      const step = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
      const below = STOPS[Math.floor(step)], above = STOPS[Math.ceil(step)];
      for (let part = 0; part < 3; part++) pixels.data[at + part] = below[part] + (above[part] - below[part]) * (step % 1);
      pixels.data[at + 3] = 255 * opacity;
    });
    pen.putImageData(pixels, 0, 0);
  }

  function mark(token) {
    const { grid: [rows, columns], slots } = state.facts;
    const cell = token % (rows * columns), wide = slots * columns;
    const x = Math.floor(token / (rows * columns)) * columns + cell % columns, y = Math.floor(cell / columns);
    for (const one of look.querySelectorAll(".mark")) {
      one.style.display = token < 0 ? "none" : "block";
      Object.assign(one.style, { left: `${100 * x / wide}%`, top: `${100 * y / rows}%`, width: `${100 / wide}%`, height: `${100 / rows}%` });
    }
  }

  function choose(x, y) {
    const { grid: [rows, columns], slots, visible } = state.facts;
    const column = Math.min(Math.max(0, x), slots * columns - 1), line = Math.min(Math.max(0, y), rows - 1);
    const token = Math.floor(column / columns) * rows * columns + line * columns + column % columns;
    if (visible && !visible.includes(token)) return false;
    state.token = token;
    relate();
    return true;
  }

  for (const panel of panels.querySelectorAll(".panel")) {
    panel.addEventListener("click", (event) => {
      if (!state.facts || !state.facts.kinds.length || state.facts.failed) return;
      const box = panel.getBoundingClientRect();
      const { grid: [rows, columns], slots } = state.facts;
      choose(Math.floor((event.clientX - box.left) / box.width * slots * columns), Math.floor((event.clientY - box.top) / box.height * rows));
    });
  }

  panels.addEventListener("keydown", (event) => {
    if (event.key === "PageDown" || event.key === "PageUp") {
      event.preventDefault();
      turnRow(event.key === "PageDown" ? 1 : -1);
      return;
    }
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || !state.facts || !state.facts.kinds.length || state.facts.failed) return;
    event.preventDefault();
    const { grid: [rows, columns], slots } = state.facts;
    const token = Math.max(0, state.token), cell = token % (rows * columns);
    let x = Math.floor(token / (rows * columns)) * columns + cell % columns, y = Math.floor(cell / columns);
    // Over tokens that a masked teacher did not see, to the next one that it did.
    do {
      x += step[0];
      y += step[1];
    } while (x >= 0 && y >= 0 && x < slots * columns && y < rows && !choose(x, y));
  });

  function turnRow(by) {
    field("row").value = Number(field("row").value) + by;
    changeRow();
  }

  function changeTeacher() {
    fill(field("tap"), teacher().taps, field("tap").value || asked.get("tap"));
    fill(field("view"), teacher().views, field("view").value || asked.get("view"));
    changeRow();
  }

  for (const form of look.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
  field("teacher").addEventListener("change", changeTeacher);
  for (const name of ["tap", "view", "row"]) field(name).addEventListener("change", changeRow);
  field("kind").addEventListener("change", () => {
    state.kind = field("kind").value;
    relate();
  });
  field("head").addEventListener("change", relate);
  field("previous").addEventListener("click", () => turnRow(-1));
  field("next").addEventListener("click", () => turnRow(1));
  field("class_token").addEventListener("click", () => {
    if (!state.facts) return;
    const { grid: [rows, columns] } = state.facts;
    state.token = state.token === -1 ? Math.floor(rows / 2) * columns + Math.floor(columns / 2) : -1;
    if (state.token >= 0 && state.facts.visible) state.token = nearest(state.facts, state.token);
    relate();
  });
  if (asked.has("row")) field("row").value = asked.get("row");
  fill(field("teacher"), choices.map((one) => one.name), asked.get("teacher"));
  changeTeacher();
}
