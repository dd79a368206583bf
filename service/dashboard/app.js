"use strict";

const POLL_MS = 1000;
const QUIET_S = 15; // without a new snapshot for this long the page says so
const HISTORY = 600; // points of the error's history, one a poll

const byId = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const digits = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const number = (value) => (value === null || value === undefined ? "–" : digits.format(value));
const count = (value) => (value === null || value === undefined ? "–" : whole.format(value));

const SHOTS = [
  ["all", "mae", "all labels"],
  ["many", "mae_many", "frequent"],
  ["medium", "mae_medium", "less frequent"],
  ["few", "mae_few", "rare"],
  ["balanced", "balanced_mae", "regions alike"],
];
const ANSWERS = [["0", "stream", []], ["1", "balanced", [7, 4]], ["median", "median", [2, 3]]];

let state = null; // the last dashboard.json
const history = ANSWERS.map(([, name, dash]) => ({ name, dash, values: [] }));

// Talking to the service

function headers() {
  const key = sessionStorage.getItem("api-key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function poll() {
  if (!document.hidden) {
    try {
      const response = await fetch("dashboard.json", { headers: headers() });
      byId("key-form").hidden = response.status !== 401;
      if (response.status === 401) {
        say("bad", "API key needed");
        return; // the form goes on
      }
      if (!response.ok) throw new Error(`the service answered ${response.status}`);
      state = await response.json();
      show();
    } catch (error) {
      say("bad", "no connection");
      notice(`The service does not answer; trying again. (${error.message})`);
    }
  }
  setTimeout(poll, POLL_MS);
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("api-key", byId("key").value);
  poll();
});

// Showing its state

function say(kind, text) {
  const pill = byId("status");
  if (pill.textContent !== text) pill.textContent = text; // a screen reader speaks at each change
  pill.className = `pill ${kind}`;
}

function notice(text) {
  const element = byId("notice");
  element.hidden = !text;
  if (element.textContent !== text) element.textContent = text;
}

function show() {
  const model = state.model;
  byId("empty").hidden = model !== null;
  byId("live").hidden = model === null;
  buildForm();
  if (model === null) {
    say("warn", "waiting");
    notice("");
    byId("empty-why").textContent = `Now: ${state.trouble}.`;
    return;
  }
  const quiet = model.age_s > QUIET_S;
  if (!model.healthy) say("bad", "unhealthy model");
  else if (state.not_ready) say("bad", "not ready");
  else if (model.pinned !== null) say("warn", "pinned");
  else if (quiet) say("warn", "quiet");
  else say("good", "live");
  notice(remark(model, quiet));

  byId("samples").textContent = count(model.samples);
  byId("step").textContent = `${count(model.step)} steps`;
  byId("rate").textContent = count(model.samples_per_second);
  byId("lag").textContent = count(model.lag_records);
  byId("version").textContent = `#${model.version}`;
  byId("age").textContent = `${Charts.duration(model.age_s)} old`;
  byId("loss").textContent = number(model.train_loss);
  byId("loss-name").textContent = model.learner.loss;
  byId("sigma").textContent = number(model.noise_sigma_label_units);
  byId("sigma-sd").textContent = `${number(model.noise_sigma)} label sd`;
  showErrors();
  remember();
  draw();
  Versions.refresh(model);
}

/** What should be known about the model that answers, if anything. */
function remark(model, quiet) {
  if (state.trouble) return `Not all is well: ${state.trouble}.`;
  if (state.not_ready) return `Not ready: ${state.not_ready}`;
  if (model.pinned !== null) {
    return `Every service of this store stays with version ${model.pinned}, whatever the trainer writes.`;
  }
  if (!quiet) return "";
  const since = Charts.duration(model.age_s);
  return `No new snapshot for ${since}: the stream is quiet, or the trainer has stopped. Predictions go on with the last model.`;
}

function showErrors() {
  const chosen = document.querySelector("input[name=window]:checked").value;
  const errors = state.model.metrics[chosen] || {};
  const rows = SHOTS.map(([, key, name]) => {
    const values = ANSWERS.map(([answer]) => (errors[answer] || {})[key] ?? null);
    const known = values.filter((value) => value !== null);
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head);
    for (const value of values) {
      const cell = document.createElement("td");
      cell.textContent = number(value);
      if (known.length > 1 && value === Math.min(...known)) cell.className = "best";
      row.append(cell);
    }
    return row;
  });
  byId("errors").replaceChildren(...rows);
}

function remember() {
  const errors = state.model.metrics.fading || {};
  const now = Date.now() / 1000;
  ANSWERS.forEach(([answer], i) => {
    const mae = (errors[answer] || {}).mae;
    if (mae !== null && mae !== undefined) history[i].values.push([now, mae]);
    if (history[i].values.length > HISTORY) history[i].values.shift();
  });
}

function draw() {
  if (!state || !state.model) return;
  const points = state.model.newest;
  byId("scatter-hint").textContent =
    `Predicted ${state.label} (upwards) against the true one; on the dashed line they agree.`;
  byId("scatter").setAttribute("aria-label", `Predictions against labels of the newest ${points.length} records`);
  Charts.scatter(byId("scatter"), points);
  Charts.lines(byId("history"), history);
}

for (const input of document.querySelectorAll("input[name=window]")) input.addEventListener("change", showErrors);
new ResizeObserver(draw).observe(byId("live"));
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// Trying a prediction

const PLACEHOLDERS = {
  numeric: "missing", categorical: "missing", timestamp: "2026-01-31T17:30:00Z", vector: "0.1, 0.2, …",
};

function buildForm() {
  const fields = byId("fields");
  if (fields.childElementCount) return;
  byId("balance").value = state.default_balance;
  showBalance();
  Object.entries(state.features).forEach(([name, feature], i) => {
    const field = document.createElement("div");
    const label = document.createElement("label");
    label.htmlFor = `field-${i}`;
    label.textContent = name;
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
    fields.append(field);
  });
}

/** The record that the form describes: dotted names are nested, what is empty is left out. */
function record() {
  const built = {};
  Object.entries(state.features).forEach(([name, feature], i) => {
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

let asked = 0; // only the answer to the newest question is shown

async function predict() {
  const mine = ++asked;
  const body = { instances: [record()], balance: Number(byId("balance").value), interval: Number(byId("interval").value) };
  let answer;
  try {
    const response = await fetch("predict", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(body),
    });
    answer = await response.json();
  } catch (error) {
    answer = { detail: `The service does not answer. (${error.message})` };
  }
  if (mine === asked) showAnswer(answer, body);
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function showAnswer(answer, body) {
  if (!answer.predictions) {
    byId("answer").replaceChildren(element("p", "error", answer.detail));
    return;
  }
  const [point, low, high] = [answer.predictions[0], answer.lower[0], answer.upper[0]];
  // The bar spans the newest labels, so that the interval is seen in proportion to them.
  const labels = state.model ? state.model.newest.map((sample) => sample.label) : [];
  const least = Math.min(low, ...labels), most = Math.max(high, ...labels);
  const place = (value) => `${((value - least) / (most - least || 1)) * 100}%`;
  const bar = element("div", "range");
  const span = element("div", "span");
  const mark = element("div", "mark");
  span.style.left = place(low);
  span.style.width = `calc(${place(high)} - ${place(low)})`;
  mark.style.left = `calc(${place(point)} - 2px)`;
  bar.append(span, mark);
  const where = `${Math.round(body.interval * 100)} % between ${number(low)} and ${number(high)}`;
  byId("answer").replaceChildren(
    element("div", "point", `${state.label} ≈ ${number(point)}`),
    bar,
    element("p", "hint", `${where} · balance ${answer.balance} · model #${answer.model_version}`),
  );
}

function showBalance() {
  byId("balance-value").textContent = Number(byId("balance").value).toFixed(2);
}

byId("balance").addEventListener("input", () => {
  showBalance();
  if (asked) predict();
});
byId("interval").addEventListener("change", () => asked && predict());
byId("try").addEventListener("submit", (event) => {
  event.preventDefault();
  predict();
});

poll();
