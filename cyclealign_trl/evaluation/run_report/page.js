"use strict";

// Every text comes from a model, a judge or a data set: it only ever becomes a text node.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069\ufeff]/g;
const visible = (text) =>
  String(text).replace(/\r\n?/g, "\n").replace(HIDDEN, (letter) =>
    `[U+${letter.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}]`);

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "line", "text"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.addEventListener("click", value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null)
    .map((child) => (child instanceof Node ? child : document.createTextNode(visible(child)))));
  return element;
}

// Data: gzip in Base64. Blocks are unpacked when they are needed, and some are kept.

async function unpack(id) {
  const letters = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const KEPT_BLOCKS = 64;
const blocks = new Map();

function readBlock(number) {
  if (!blocks.has(number)) blocks.set(number, unpack(`block-${number}`));
  if (blocks.size > KEPT_BLOCKS) blocks.delete(blocks.keys().next().value);
  return blocks.get(number);
}

const EXCERPT = 0, BLOCK = 1, PLACE = 2, LEVELS = 3; // fields of a listed prompt
const readGroup = async (index, number) => (await readBlock(index.groups[number][BLOCK]))[index.groups[number][PLACE]];

function interaction(fields) {
  const [step, position, completions, ranker, policy, agreement, ranks, improved, failure, usage, consistency, shown] = fields;
  return { step, position, completions, ranker, policy, agreement: agreement || [], ranks, improved, failure, usage, consistency, shown };
}

// Parts of the page

const LONG = 3000, CUT = 2000; // characters
const plural = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const letter = (index) => (index < 26 ? String.fromCharCode(65 + index) : `${index + 1}`);

function textBlock(text) {
  const whole = visible(text);
  if (whole.length <= LONG) return make("div", { class: "text", dir: "auto" }, whole);
  const block = make("div", { class: "text", dir: "auto" }, `${whole.slice(0, CUT)}…`);
  const more = make("button", {
    type: "button", class: "more",
    onclick: () => { block.textContent = whole; more.remove(); },
  }, `Show all ${whole.length.toLocaleString("en")} characters`);
  return make("div", {}, block, more);
}

function promptBlock(prompt) {
  const block = make("div", { class: "prompt" });
  if (!Array.isArray(prompt)) block.append(make("div", { class: "label-small" }, "prompt"), textBlock(prompt));
  else for (const { role, content } of prompt) block.append(make("div", { class: "label-small" }, role), textBlock(content));
  return block;
}

function chips(order, it, ties) {
  if (!order) return make("span", { class: "meta" }, "–");
  const list = make("span", { class: "chips", role: "img", "aria-label": order.map(letter).join(", ") });
  order.forEach((index, place) => {
    if (ties && place && it.ranks[order[place - 1]] === it.ranks[index]) list.append(make("span", { class: "tie" }, "="));
    list.append(make("span", { class: it.agreement.includes(index) ? "chip agreed" : "chip" }, letter(index)));
  });
  return list;
}

function orderLines(it) {
  const rows = Math.max(it.ranker.length, it.policy.length), height = 30 + 24 * rows;
  const y = (place) => 38 + 24 * place;
  const svg = make("svg", {
    viewBox: `0 0 168 ${height}`, role: "img",
    "aria-label": `The ranker orders ${it.ranker.map(letter).join(", ")}; the policy ${it.policy.map(letter).join(", ")}; both agree on ${it.agreement.map(letter).join(", ") || "nothing"}.`,
  }, make("text", { class: "head", x: 0, y: 12 }, "ranker"), make("text", { class: "head", x: 168, y: 12, "text-anchor": "end" }, "policy"));
  it.ranker.forEach((index, place) => {
    const other = it.policy.indexOf(index);
    if (other >= 0) svg.append(make("line", { class: it.agreement.includes(index) ? "agreed" : "", x1: 26, x2: 142, y1: y(place) - 4, y2: y(other) - 4 }));
    svg.append(make("text", { x: 8, y: y(place) }, letter(index)));
  });
  it.policy.forEach((index, place) => svg.append(make("text", { x: 150, y: y(place) }, letter(index))));
  return svg;
}

function facts(it) {
  const list = make("ul", { class: "meta" });
  const add = (...children) => list.append(make("li", {}, ...children));
  add(`Optimiser step ${it.step + 1}, interaction ${it.position + 1} of the prompt`);
  if (it.failure) add(make("span", { class: "failure" }, `No ranking: ${it.failure}`));
  else if (it.agreement.length) add(`Agreed on ${it.agreement.length} of ${new Set(it.ranks).size} ranks: ${it.agreement.map(letter).join(" > ")}`);
  else add("The ranker prefers none of the completions");
  if (it.consistency !== null) add(`Consistency of the ranker's passes ${it.consistency.toFixed(2)}`);
  if (it.usage) {
    const [sent, received, cost, attempts, cached] = it.usage;
    add(`${plural(sent, "token")} sent, ${received.toLocaleString("en")} received${attempts > 1 ? `, in ${attempts} attempts` : ""}`);
    if (cached) add("From the cache, not billed again");
    else if (cost !== null) add(`$${cost.toPrecision(3)}`);
  }
  return list;
}

function completionBlock(it, index) {
  const agreed = it.agreement.includes(index);
  const first = it.completions.indexOf(it.completions[index]);
  const place = it.policy ? it.policy.indexOf(first) : -1;
  return make("article", { class: agreed ? "completion agreed" : "completion" },
    make("header", {}, make("span", { class: agreed ? "chip agreed" : "chip" }, letter(index)),
      it.ranks ? make("span", {}, `ranker ${it.ranks[index] + 1}`) : null,
      place >= 0 ? make("span", {}, `policy ${place + 1}`) : null,
      agreed ? make("strong", {}, "agreed") : null,
      first !== index ? make("span", {}, `same text as ${letter(first)}`) : null),
    textBlock(it.completions[index]));
}

// Demonstrations that the ranker was shown

function demonstrationBlock(title, prompt, completions, order, open) {
  return make("article", {}, make("div", { class: "label-small" }, title), prompt === null ? null : promptBlock(prompt),
    make("ol", {}, ...order.map((index) => make("li", {}, textBlock(completions[index])))),
    open ? make("button", { type: "button", class: "more", onclick: open }, "Go to this prompt") : null);
}

function shownBlock(index, group, run, it, open) {
  if (!index.known[run] || it.shown === null) return null;
  const initial = it.shown.filter((source) => typeof source === "number" && source < 0).length;
  const summary = it.shown.length
    ? `Shown to the ranker: ${initial} from the start, ${it.shown.length - initial} from agreements`
    : "Shown to the ranker: no demonstrations";
  if (!it.shown.length) return make("p", { class: "meta shown" }, summary);
  const details = make("details", { class: "shown" }, make("summary", {}, summary));
  const fill = async () => {
    for (const source of it.shown) {
      if (Array.isArray(source)) {
        const [number, place] = source;
        const [prompt, byRun] = await readGroup(index, number);
        const other = interaction(byRun.find(([own]) => own === run)[1][place]);
        const title = `Agreement of step ${other.step + 1}, best first`;
        details.append(number === group ? demonstrationBlock(`${title}, on this prompt`, null, other.completions, other.agreement)
          : demonstrationBlock(title, prompt, other.completions, other.agreement, () => open(number)));
      } else if (source < 0) {
        details.append(demonstrationBlock("From the start of the run, best first", ...index.demonstrations[run][-1 - source]));
      } else details.append(make("p", { class: "meta" }, "The agreement of a prompt that the page leaves out."));
    }
  };
  details.addEventListener("toggle", fill, { once: true });
  return details;
}

// Interactions of one prompt in one run, with a step through them

function runPane(index, group, run, fields, open) {
  const its = fields.map(interaction);
  const body = make("div", {});
  const rows = its.map((it, place) => make("tr", { class: place && it.position <= its[place - 1].position ? "cycle" : "" },
    make("th", { scope: "row" }, make("button", {
      type: "button", tabindex: -1, "aria-label": `Interaction ${it.position + 1}, step ${it.step + 1}`, onclick: () => select(place),
    }, `${it.position + 1}`)),
    make("td", {}, `${it.step + 1}`), make("td", {}, chips(it.ranker, it, true)), make("td", {}, chips(it.policy, it)),
    it.failure ? make("td", { class: "failure" }, it.failure) : make("td", {}, `${it.agreement.length} of ${new Set(it.ranks).size}`)));
  const table = make("table", { class: "steps" },
    make("thead", {}, make("tr", {}, ...["", "step", "ranker", "policy", "agreed"].map((title) => make("th", { scope: "col" }, title || make("span", { class: "vh" }, "interaction"))))),
    make("tbody", {}, ...rows));
  let current = 0;

  function select(place) {
    current = place;
    rows.forEach((row, other) => {
      row.setAttribute("aria-current", other === place);
      row.querySelector("button").tabIndex = other === place ? 0 : -1;
    });
    const it = its[place];
    const known = it.ranker || it.policy || [];
    const order = [...known, ...it.completions.keys()].filter((value, at, all) => all.indexOf(value) === at);
    body.replaceChildren(
      make("div", { class: "compare" }, it.ranker && it.policy ? orderLines(it) : null, facts(it)),
      ...order.map((number) => completionBlock(it, number)),
      ...(it.improved === null ? [] : [make("article", { class: "completion improved" },
        make("header", {}, make("strong", {}, "improved"), make("span", {}, "written by the ranker or the corrector")), textBlock(it.improved))]),
      ...[shownBlock(index, group, run, it, open)].filter(Boolean));
  }

  table.addEventListener("keydown", (event) => {
    const move = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1, Home: -its.length, End: its.length }[event.key];
    if (!move) return;
    event.preventDefault();
    select(Math.min(its.length - 1, Math.max(0, current + move)));
    rows[current].querySelector("button").focus();
  });
  select(0);
  return make("div", { class: "pane" }, index.runs.length > 1 ? make("h3", {}, make("span", { class: `swatch c${run % 6}` }), index.runs[run]) : null,
    make("div", { class: "scroll" }, table), body);
}

// The list of prompts: only the rows in view exist

const ROW = 40; // pixels

function startBrowser(index) {
  const browser = document.querySelector(".browser");
  if (!browser) return;
  browser.hidden = false;
  const [list, space, detail, count] = [".list", ".rows", ".detail", ".count"].map((name) => browser.querySelector(name));
  const find = document.getElementById("find"), filter = document.getElementById("filter");
  let matches = index.groups.map((_, number) => number), selected = 0, search = 0, pending = false;

  function bars([run, levels]) {
    const bar = make("span", { class: "levels" });
    for (const level of levels.slice(-12)) bar.append(make("i", { class: `level l${level}` }, level === "x" ? "×" : level === "-" ? "=" : ""));
    return bar;
  }

  function draw() {
    pending = false;
    space.style.height = `${matches.length * ROW}px`;
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
    const last = Math.min(matches.length, first + Math.ceil(list.clientHeight / ROW) + 9);
    space.replaceChildren(...matches.slice(first, last).map((number, offset) => {
      const place = first + offset, group = index.groups[number];
      const row = make("div", {
        class: "row", role: "option", id: `row-${place}`, "aria-selected": place === selected,
        "aria-setsize": matches.length, "aria-posinset": place + 1, onclick: () => select(place),
      }, make("span", { class: "excerpt" }, make("bdi", {}, group[EXCERPT])), ...group[LEVELS].map(bars));
      row.style.top = `${place * ROW}px`;
      return row;
    }));
    if (document.getElementById(`row-${selected}`)) list.setAttribute("aria-activedescendant", `row-${selected}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function schedule() {
    if (!pending) { pending = true; requestAnimationFrame(draw); }
  }

  async function select(place) {
    selected = place;
    if (place * ROW < list.scrollTop) list.scrollTop = place * ROW;
    else if ((place + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * ROW - list.clientHeight;
    draw();
    await show(matches[place]);
  }

  async function show(number) {
    if (number === undefined) return detail.replaceChildren(make("p", { class: "meta" }, "No prompt matches."));
    detail.dataset.group = number;
    const [prompt, byRun] = await readGroup(index, number);
    if (detail.dataset.group !== String(number)) return undefined; // another one was selected meanwhile
    const panes = byRun.map(([run, fields]) => runPane(index, number, run, fields, open));
    return detail.replaceChildren(promptBlock(prompt), make("div", { class: "panes" }, ...panes));
  }

  function open(number) {
    find.value = "";
    filter.value = "all";
    matches = index.groups.map((_, other) => other);
    report();
    select(number);
    detail.focus();
  }

  function passes(group) {
    return filter.value === "all" || group[LEVELS].some(([, levels]) => {
      const digits = [...levels].filter((level) => level >= "0" && level <= "9");
      const first = digits[0], last = digits[digits.length - 1];
      return { failed: levels.includes("x"), full: last === "9", less: last < first, more: last > first }[filter.value];
    });
  }

  function contains([prompt, byRun], query) {
    const has = (text) => text !== null && String(text).toLowerCase().includes(query);
    const texts = Array.isArray(prompt) ? prompt.map((message) => message.content) : [prompt];
    return texts.some(has) || byRun.some(([, fields]) => fields.some((it) => it[2].some(has) || has(it[7])));
  }

  const report = (suffix = "") => { count.textContent = `${matches.length.toLocaleString("en")} of ${plural(index.groups.length, "prompt")}${suffix}`; };

  async function update() {
    const own = ++search, query = find.value.trim().toLowerCase();
    const candidates = index.groups.map((_, number) => number).filter((number) => passes(index.groups[number]));
    let found = candidates;
    if (query) {
      found = [];
      count.textContent = "Searching";
      for (const number of candidates) {
        if (contains(await readGroup(index, number), query)) found.push(number);
        if (own !== search) return;
      }
    }
    matches = found;
    list.scrollTop = 0;
    report();
    await select(0);
  }

  let timer = 0;
  find.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(update, 200); });
  filter.addEventListener("change", update);
  list.addEventListener("scroll", schedule, { passive: true });
  new ResizeObserver(schedule).observe(list);
  list.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -matches.length, End: matches.length }[event.key];
    if (event.key === "Enter") detail.focus();
    if (!move || !matches.length) return;
    event.preventDefault();
    select(Math.min(matches.length - 1, Math.max(0, selected + move)));
  });
  update();
}

// Replies before and after

const PAIRS = 6; // a page

function startPairs(index) {
  const pairs = document.querySelector(".pairs");
  if (!pairs) return;
  pairs.hidden = false;
  const source = document.getElementById("source");
  const [list, about, pageText, previous, next] = [".pair-list", ".about", ".page", ".previous", ".next"].map((name) => pairs.querySelector(name));
  let page = 0;

  function reply(title, texts, kind) {
    const block = make("div", { class: `reply ${kind}` });
    let current = 0;
    const draw = () => block.replaceChildren(
      make("header", {}, make("span", {}, title), texts.length > 1
        ? make("button", { type: "button", class: "more", onclick: () => { current = (current + 1) % texts.length; draw(); block.querySelector("button").focus(); } }, `sample ${current + 1} of ${texts.length}`) : null),
      textBlock(texts[current] ?? ""));
    draw();
    return block;
  }

  const preferred = (fields) => { const it = interaction(fields); return it.completions[(it.policy || [0])[0]]; };

  async function pair(number) {
    const held = source.value === "held";
    const [prompt, byRun] = held ? index.held[number] : await readGroup(index, number);
    const block = make("article", { class: "pair" }, promptBlock(prompt));
    for (const entry of byRun) {
      const run = entry[0], its = entry[1];
      const [before, after] = held ? [entry[1], entry[2]] : [[preferred(its[0])], [preferred(its[its.length - 1])]];
      const name = index.runs.length > 1 ? `${index.runs[run]}, ` : "";
      block.append(make("div", { class: "replies" },
        reply(held ? `${name}before training` : `${name}step ${its[0][0] + 1}`, before, "before"),
        reply(held ? `${name}after training` : `${name}step ${its[its.length - 1][0] + 1}`, after, "after")));
    }
    return block;
  }

  async function draw() {
    const held = source.value === "held", total = held ? index.held.length : index.groups.length;
    const last = Math.max(0, Math.ceil(total / PAIRS) - 1), own = page;
    about.textContent = held ? "Replies to prompts that were not trained on." : "Of the samples of an interaction, the one that the policy itself prefers.";
    pageText.textContent = `Page ${page + 1} of ${last + 1}`;
    previous.disabled = page === 0;
    next.disabled = page === last;
    const numbers = [...Array(PAIRS).keys()].map((offset) => page * PAIRS + offset).filter((number) => number < total);
    const drawn = await Promise.all(numbers.map(pair));
    if (own === page && held === (source.value === "held")) list.replaceChildren(...drawn);
  }

  source.addEventListener("change", () => { page = 0; draw(); });
  previous.addEventListener("click", () => { page -= 1; draw(); });
  next.addEventListener("click", () => { page += 1; draw(); });
  draw();
}

// Charts: the values at a step

function startCharts(index) {
  for (const figure of document.querySelectorAll(".chart")) {
    const { x: [low, high], unit, series } = index.charts[figure.dataset.chart];
    const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor"), at = figure.querySelector(".at");
    const line = figure.querySelector(".grid"), left = Number(line.getAttribute("x1")), right = Number(line.getAttribute("x2"));
    const values = [...figure.querySelectorAll(".value")], labels = [...figure.querySelectorAll(".label")];
    const last = values.map((value) => value.textContent);
    const steps = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
    let current = steps.length - 1;
    const nearest = (all, step) => all.reduce((best, value, place) => (Math.abs(value - step) < Math.abs(all[best] - step) ? place : best), 0);

    function show(place) {
      current = place;
      const step = steps[place], x = left + (step - low) / (high - low) * (right - left);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.setAttribute("visibility", "visible");
      const texts = series.map((one) => {
        const near = nearest(one.x, step), number = (value) => unit + value.toLocaleString("en", { maximumSignificantDigits: 4 });
        return number(one.y[near]) + (one.low ? ` [${number(one.low[near])}, ${number(one.high[near])}]` : "");
      });
      texts.forEach((text, one) => { values[one].textContent = text; });
      at.replaceChildren(`step ${step.toLocaleString("en")}`, make("span", { class: "vh" }, texts.map((text, one) => `, ${labels[one].textContent} ${text}`).join("")));
    }

    function hide() {
      cursor.setAttribute("visibility", "hidden");
      at.textContent = "";
      values.forEach((value, one) => { value.textContent = last[one]; });
    }

    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      show(nearest(steps, low + (x - left) / (right - left) * (high - low)));
    });
    svg.addEventListener("pointerleave", hide);
    figure.addEventListener("blur", hide);
    figure.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1, Home: -steps.length, End: steps.length }[event.key];
      if (!move) return;
      event.preventDefault();
      const shown = cursor.getAttribute("visibility") === "visible";
      show(Math.min(steps.length - 1, Math.max(0, shown ? current + move : current)));
    });
  }
}

async function start() {
  const index = await unpack("index");
  startCharts(index);
  startBrowser(index);
  startPairs(index);
  document.documentElement.dataset.ready = "true";
}

if ("DecompressionStream" in window) start();
else for (const part of document.querySelectorAll(".browser, .pairs")) {
  part.replaceWith(make("p", { class: "note" }, "This browser is too old to show this part: it has no DecompressionStream."));
}
