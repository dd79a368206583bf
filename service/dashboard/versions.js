// The table of kept versions, and rolling back to one of them.

import { askForKey, byId, count, duration, element, headers } from "./page.js";

const EVERY_MS = 3000; // a trainer writes two versions a second; nobody reads so many
const rows = new Map(); // by version, so that a row that stays keeps its focus
let listed = null;
let task = null;
let asked = -EVERY_MS;
let shown = { version: 0, pinned: null }; // what answered when the table was last fetched

/** Fetches the list again if a roll back began or ended, or now and then. */
export function refresh({ version }, pinned, ofTask) {
  task = ofTask;
  const changed = pinned !== shown.pinned || (pinned !== null && version !== shown.version);
  if (!changed && performance.now() - asked < EVERY_MS) return;
  shown = { version, pinned };
  load();
}

async function load() {
  asked = performance.now();
  try {
    const response = await fetch("models", { headers: headers() });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.detail);
    listed = answer;
    complain("");
    show();
  } catch (error) {
    complain(`The versions cannot be listed. ${error.message}`);
  }
}

async function activate(version) {
  try {
    const response = await fetch(`models/${version}/activate`, { method: "POST", headers: headers() });
    const answer = await response.json();
    askForKey(response);
    if (!response.ok) throw new Error(answer.detail);
    complain("");
  } catch (error) {
    complain(error.message);
  }
}

function complain(text) {
  byId("versions-error").hidden = !text;
  byId("versions-error").textContent = text;
}

function build(model) {
  const row = document.createElement("tr");
  const head = element("th", "", `#${model.version}${model.healthy ? "" : " unhealthy"}`);
  head.scope = "row";
  const samples = element("td", "spare", count(model.samples));
  const [natural, balanced] = task.kept.map((key) => task.format([model[key]])(model[key]));
  row.append(
    head, element("td", "age"), samples, element("td", "", natural), element("td", "spare", balanced), element("td", "use"),
  );
  return row;
}

function button(version) {
  const made = element("button", "quiet");
  made.addEventListener("click", () => activate(version));
  return made;
}

/** Only an older version than the one that answers is rolled back to. */
function label(made, version) {
  const older = listed.in_use === null || version < listed.in_use;
  made.textContent = older ? "Roll back" : "Use";
  made.setAttribute("aria-label", older ? `Roll back to version ${version}` : `Use version ${version}`);
}

function show() {
  const body = byId("versions");
  const kept = new Set(listed.models.map((model) => model.version));
  for (const [version, row] of rows) {
    if (!kept.has(version)) {
      row.remove();
      rows.delete(version);
    }
  }
  listed.models.forEach((model, place) => {
    if (!rows.has(model.version)) rows.set(model.version, build(model));
    const row = rows.get(model.version);
    if (body.children[place] !== row) body.insertBefore(row, body.children[place] ?? null);
    row.querySelector(".age").textContent = duration(Math.max(0, Date.now() / 1000 - model.created_s));
    const use = row.querySelector(".use");
    if (model.version === listed.in_use) {
      use.textContent = listed.pinned === null ? "in use" : "pinned";
      return;
    }
    if (!use.querySelector("button")) use.replaceChildren(button(model.version));
    label(use.firstElementChild, model.version);
  });
  byId("follow").hidden = listed.pinned === null;
}

byId("follow").addEventListener("click", () => activate("latest"));
