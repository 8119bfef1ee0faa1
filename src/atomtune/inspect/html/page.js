"use strict";
// Texts of records enter the page as text nodes only. The place in the report is kept in the address behind #, so that a
// link or a bookmark shows the same: #problem=duplicates&q=hello&lang=zh&theme=dark
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const list = document.getElementById("records");
const search = document.getElementById("search");
const more = document.getElementById("more");
const PAGE = 40;
const written = root.lang === "zh" ? "zh" : ""; // the language of the run, where it is not English
let state = read();
let shown = [];

function read() {
  const said = new URLSearchParams(location.hash.slice(1));
  const guess = written || ((navigator.language || "").startsWith("zh") ? "zh" : "en");
  return {
    q: said.get("q") || "",
    problem: said.get("problem") || "",
    lang: ["en", "zh"].includes(said.get("lang")) ? said.get("lang") : guess,
    theme: ["light", "dark"].includes(said.get("theme")) ? said.get("theme") : "",
  };
}

function keep() {
  const said = new URLSearchParams(Object.entries(state).filter(([, value]) => value));
  history.replaceState(null, "", "#" + said);
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function both(en, zh, className) {
  const made = element("span", className);
  for (const [lang, text] of [["en", en], ["zh", zh]]) {
    const part = element("span", "", text);
    part.lang = lang;
    made.append(part);
  }
  return made;
}

// What is searched: a record's tokens as running text, visible marks turned back into white space and split characters
// joined again.
const texts = new Map();
const bytes = new TextDecoder();
function characters(run) {
  return bytes.decode(Uint8Array.from(run.match(/[0-9A-F]{2}/g), (byte) => parseInt(byte, 16)));
}

function textOf(record) {
  if (!texts.has(record)) {
    const joined = record.examples.map((one) => one.ids.map((id) => data.pieces[id][0]).join("")).join(" ");
    const whole = joined.replace(/(?:⟨[0-9A-F]{2}⟩)+/g, characters);
    texts.set(record, (record.origin + " " + whole).replace(/·/g, " ").replace(/[↵⇥]/g, " ").toLowerCase());
  }
  return texts.get(record);
}

function label(name) {
  return document.querySelector(`[data-problem="${CSS.escape(name)}"]`).querySelectorAll("[lang]");
}

function tag(name, like) {
  const [en, zh] = [...label(name)].map((one) => one.textContent);
  return both(en + (like ? ": like " + like : ""), zh + (like ? "：同 " + like : ""), "tag");
}

function tokens(example) {
  const box = element("p", "tokens");
  let at = 0;
  for (const [count, learn] of example.runs) {
    for (const end = at + count; at < end; at++) {
      const [text, control] = data.pieces[example.ids[at]];
      const one = element("span", (learn ? "l" : "") + (control ? " c" : ""), text);
      one.title = "id " + example.ids[at] + (learn ? " · learned" + (learn > 1 ? " " + learn + "×" : "") : " · read only");
      box.append(one);
      if (text.includes("↵")) box.append("\n");
    }
  }
  return box;
}

function card(record) {
  const made = element("article", "record");
  const head = element("h3");
  const size = record.examples.reduce((sum, one) => sum + one.ids.length, 0);
  const learned = record.examples.reduce((sum, one) => sum + one.runs.reduce((s, [n, l]) => s + (l ? n : 0), 0), 0);
  head.append(element("b", "", record.origin), both(`${size} tokens, ${learned} learned`, `${size} 个词元，学习 ${learned} 个`));
  const parts = record.examples.length;
  if (parts > 1) head.append(both(`learned in ${parts} parts, as a server would send them`, `分 ${parts} 段学习，与服务器所见一致`));
  for (const [name, like] of Object.entries(record.problems)) head.append(tag(name, like));
  made.append(head, ...record.examples.map(tokens));
  return made;
}

function refusal([origin, reason, chinese]) {
  const made = element("article", "record refused");
  const head = element("h3");
  head.append(element("b", "", origin), tag("refused", ""));
  const why = element("p");
  why.append(both(reason, chinese));
  made.append(head, why);
  return made;
}

function found() {
  const wanted = state.q.toLowerCase();
  if (state.problem === "refused") return data.refused.filter((one) => one.join(" ").toLowerCase().includes(wanted));
  const among = state.problem ? (data.problems[state.problem] || []).map((i) => data.records[i]) : data.records;
  return wanted ? among.filter((record) => textOf(record).includes(wanted)) : among;
}

function extend() {
  const made = state.problem === "refused" ? refusal : card;
  list.append(...shown.slice(list.children.length, list.children.length + PAGE).map(made));
  more.hidden = list.children.length >= shown.length;
}

function draw() {
  root.dataset.lang = state.lang;
  root.lang = state.lang;
  if (state.theme) root.dataset.theme = state.theme;
  document.getElementById("language").textContent = state.lang === "en" ? "中文" : "English";
  for (const chip of document.querySelectorAll(".chip")) {
    chip.setAttribute("aria-pressed", String(chip.dataset.problem === state.problem));
  }
  for (const line of document.querySelectorAll(".meaning")) line.hidden = line.dataset.means !== state.problem;
  if (search.value !== state.q) search.value = state.q;
  shown = found();
  const count = document.getElementById("count");
  count.replaceChildren(both(`Records found: ${shown.length.toLocaleString("en")}`, `找到 ${shown.length.toLocaleString("en")} 条记录`));
  list.replaceChildren();
  extend();
}

function change(what) {
  Object.assign(state, what);
  keep();
  draw();
}

for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => change({ problem: state.problem === chip.dataset.problem ? "" : chip.dataset.problem }));
}
search.addEventListener("input", () => change({ q: search.value }));
more.addEventListener("click", extend);
document.getElementById("language").addEventListener("click", () => change({ lang: state.lang === "en" ? "zh" : "en" }));
document.getElementById("theme").addEventListener("click", () => {
  const dark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  change({ theme: dark ? "light" : "dark" });
});
addEventListener("hashchange", () => { state = read(); draw(); });
draw();
