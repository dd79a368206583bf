// The form to try a prediction: made from the schema, answered with the distribution that the prediction is read from.

import * as charts from "./charts.js";
import { askForKey, byId, element, headers, rounded } from "./page.js";

const TYPED_MS = 300; // after the last key pressed, the question is asked
const REFRESH_MS = 5000; // a newer model is asked again no sooner than this
const MOST_CLASSES = 8; // drawn, from the most probable
const PLACEHOLDERS = {
  numeric: "missing", categorical: "missing", timestamp: "2026-01-31T17:30:00Z", vector: "0.1, 0.2, …",
};

let page = null; // the schema's fields and the label's name
let answer = null; // to the question asked last
let ends = []; // the answers to it at balance 0 and 1
let asked = 0; // counts questions: only the answer to the newest one is shown
let askedAt = -REFRESH_MS;
let answering = 0; // the version that answered

/** Builds the form, once. */
export function build(facts) {
  if (page) return;
  page = facts;
  byId("interval-field").hidden = isOfClasses();
  byId("density").hidden = isOfClasses();
  byId("shares").hidden = !isOfClasses();
  byId("outcome").classList.toggle("classes", isOfClasses());
  byId("balance").value = page.default_balance;
  showBalance();
  Object.entries(page.features).forEach(([name, feature], i) => {
    const field = document.createElement("div");
    const label = element("label", "", name);
    label.htmlFor = `field-${i}`;
    const input = document.createElement(feature.kind === "boolean" ? "select" : "input");
    input.id = label.htmlFor;
    if (feature.kind === "boolean") {
      for (const text of ["missing", "true", "false"]) input.add(new Option(text));
    } else {
      input.type = feature.kind === "numeric" ? "number" : "text";
      if (feature.kind === "numeric") input.step = "any";
      input.placeholder = PLACEHOLDERS[feature.kind];
      input.autocomplete = "off";
    }
    field.append(label, input);
    byId("fields").append(field);
  });
}

/** Asks again when another version answers, now and then. */
export function refresh(model) {
  if (model.version === answering || performance.now() - askedAt < REFRESH_MS) return;
  answering = model.version;
  ask();
}

/** The record that the form describes: dotted names are nested, what is empty is left out. */
function record() {
  const built = {};
  Object.entries(page.features).forEach(([name, feature], i) => {
    const text = byId(`field-${i}`).value.trim();
    if (!text || (feature.kind === "boolean" && text === "missing")) return;
    const path = name.split(".");
    const last = path.pop();
    let table = built;
    for (const part of path) table = table[part] ??= {};
    table[last] = typed(text, feature.kind);
  });
  return built;
}

function typed(text, kind) {
  if (kind === "numeric") return Number(text);
  if (kind === "boolean") return text === "true";
  if (kind === "vector") return text.split(",").map((part) => Number(part));
  return kind === "timestamp" && /^-?\d+$/.test(text) ? Number(text) : text;
}

const isOfClasses = () => page.task === "classification";

async function post(path, body) {
  const sent = { method: "POST", headers: { "Content-Type": "application/json", ...headers() }, body };
  const response = await fetch(path, sent);
  askForKey(response);
  const found = await response.json();
  if (!response.ok) throw new Error(found.detail);
  return found;
}

/** The answer for one record: with the density where labels are numbers, with probabilities where they are classes. */
function answered(instance, balance) {
  if (isOfClasses()) return post("predict", JSON.stringify({ instances: [instance], balance }));
  const query = new URLSearchParams({ balance, interval: byId("interval").value });
  return post(`predict/density?${query}`, JSON.stringify(instance));
}

/** Asks at the balance of the slider; unless it is the slider alone that moved, at both of its ends too. */
async function ask(moved = false) {
  const mine = ++asked;
  askedAt = performance.now();
  const instance = record();
  const balances = [Number(byId("balance").value), ...(moved && ends.length ? [] : [0, 1])];
  try {
    const [found, ...others] = await Promise.all(balances.map((balance) => answered(instance, balance)));
    if (mine !== asked) return;
    answer = found;
    if (others.length) ends = others;
    showAnswer();
  } catch (error) {
    if (mine !== asked) return;
    answer = null;
    const text = error instanceof TypeError ? `The service does not answer. (${error.message})` : error.message;
    byId("answer").replaceChildren(element("p", "error", text));
  }
}

function showAnswer() {
  const from = `balance ${answer.balance} · model #${answer.model_version}`;
  if (isOfClasses()) {
    const name = answer.predictions[0];
    const share = answer.probabilities[0][name];
    say(`${page.label}: ${name}`, `with a probability of ${percent(share)} · ${from}`);
  } else {
    const exact = (value) => rounded(value, answer.upper - answer.lower);
    const share = Math.round(Number(byId("interval").value) * 100);
    const where = `${share} % between ${exact(answer.lower)} and ${exact(answer.upper)}`;
    byId("density").setAttribute("aria-label", `Predictive density of ${page.label}: ${where}`);
    say(`${page.label} ≈ ${exact(answer.prediction)}`, `${where} · ${from}`);
  }
  draw();
}

function say(point, hint) {
  byId("answer").replaceChildren(element("div", "point", point), element("p", "hint", hint));
}

export function draw() {
  if (!answer) return;
  if (isOfClasses()) {
    showShares();
  } else if (answer.edges.length) charts.density(byId("density"), answer, ends, page.label);
}

/** Probabilities of the likeliest classes as bars, each with a stroke where it ends at either end of the slider. */
function showShares() {
  // Sorted again: an object's names that look like whole numbers come first.
  const sorted = Object.entries(answer.probabilities[0]).sort(([, one], [, other]) => other - one);
  const rows = sorted.slice(0, MOST_CLASSES).map(([name, share]) => {
    const row = element("li");
    const track = element("span", "track");
    const fill = element("span", "fill");
    fill.style.width = `${100 * share}%`;
    track.append(fill);
    ends.forEach((other, i) => {
      const mark = element("span", `mark ${["stream", "balanced"][i]}`);
      mark.style.left = `${100 * (other.probabilities[0][name] ?? 0)}%`;
      track.append(mark);
    });
    row.append(element("span", "name", name), track, element("span", "share", percent(share)));
    return row;
  });
  byId("shares").replaceChildren(...rows);
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

function showBalance() {
  byId("balance-value").textContent = Number(byId("balance").value).toFixed(2);
}

let typing;
byId("fields").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(ask, TYPED_MS);
});
byId("balance").addEventListener("input", () => {
  showBalance();
  ask(true);
});
byId("interval").addEventListener("change", () => ask(true));
byId("try").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typing);
  ask();
});
