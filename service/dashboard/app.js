// The page: what the service's events say, put where it belongs.

import * as charts from "./charts.js";
import { follow } from "./events.js";
import { askForKey, byId, count, duration, element, keepKey, number, write } from "./page.js";
import * as question from "./question.js";
import { taskOf } from "./tasks.js";
import * as versions from "./versions.js";

const QUIET_S = 15; // without a new snapshot for this long the page says so
const HISTORY = 600; // points of the error's history
const NEWEST = 40; // classes that are shown

// The newest event of each kind; `model` is null while there is none, `lost` is why no events come.
const heard = { page: null, model: null, now: null, lost: null };
let fresh = false; // whether the model has not been shown yet
let task = null; // what the page says of labels of this kind
let history = []; // of each answer
const drifts = []; // when the trainer was heard to have raised an alarm, seconds
let alarms = null; // it has raised so far

const again = follow(
  (kind, data) => {
    heard[kind] = data;
    heard.lost = null;
    if (kind === "page") build(data);
    if (kind === "model") fresh = true;
    if (kind === "now") show(); // which follows the others
  },
  (error) => {
    heard.lost = error;
    if (error.response) askForKey(error.response);
    show();
  },
);

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(byId("key").value);
  again();
});

/** Fits the page to the task, once. */
function build(page) {
  if (task) return;
  task = taskOf(page);
  history = task.answers.map(([, name, dash]) => ({ name, dash, values: [] }));
  write("error-title", task.title);
  write("history-title", task.history);
  write("alike-title", task.alike);
  write("kept-title", task.keptTitle);
  write("sigma-title", task.sigma);
  for (const place of document.querySelectorAll(".constant")) place.textContent = task.constant;
  question.build(page);
}

/** How things are: what the pill says, how serious it is, and what should be known besides. */
function verdict() {
  const { model, now, lost } = heard;
  if (lost && lost.response && lost.response.status === 401) return ["bad", "API key needed", ""];
  if (lost) {
    const stale = model ? " What is shown is how things were before." : "";
    return ["bad", "no connection", `The service does not answer: ${lost.message}. Trying again.${stale}`];
  }
  if (!now) return ["", "connecting", ""];
  if (!model) return ["warn", "waiting", ""];
  if (!model.healthy) return ["bad", "unhealthy model", `Not all is well: ${now.trouble}.`];
  if (now.not_ready) return ["bad", "not ready", `Not ready: ${now.not_ready}`];
  if (now.trouble) {
    const on = `Predictions go on with version ${model.version}.`;
    return ["warn", "held back", `The newest snapshot is not in use: ${now.trouble}. ${on}`];
  }
  if (now.pinned !== null) {
    const stays = `Every service of this store stays with version ${now.pinned}, whatever the trainer writes.`;
    return ["warn", "pinned", stays];
  }
  if (now.age_s > QUIET_S) {
    const behind = model.lag_records > 0;
    const why = behind
      ? `${count(model.lag_records)} records were waiting then: the trainer has stopped, or cannot go on`
      : "the stream is quiet, or the trainer has stopped";
    const text = `No new snapshot for ${duration(now.age_s)}: ${why}. Predictions go on with the last model.`;
    return ["warn", behind ? "trainer silent" : "quiet", text];
  }
  return ["good", "live", ""];
}

function show() {
  const { model, now, lost } = heard;
  const [kind, text, notice] = verdict();
  write("status", text);
  byId("status").className = `pill ${kind}`;
  write("notice", notice);
  byId("notice").hidden = !notice;
  byId("live").classList.toggle("stale", Boolean(lost));
  byId("live").hidden = byId("model").hidden = !model;
  byId("empty").hidden = Boolean(model || lost || !now);
  if (!lost) byId("key-form").hidden = true;
  if (!now) return;
  if (!model) {
    write("empty-why", `Now: ${now.trouble}.`);
    return;
  }
  if (now.age_s !== null) write("age", duration(now.age_s));
  write("freshness", now.freshness_s === null ? "–" : duration(now.freshness_s));
  if (fresh) showModel(model);
  fresh = false;
  if (!lost) versions.refresh(model, now.pinned, task);
}

function showModel(model) {
  write("version", `#${model.version}`);
  write("samples", count(model.samples));
  write("step", `${count(model.step)} steps`);
  write("rate", count(model.samples_per_second));
  write("lag", count(model.lag_records));
  write("loss", number(model.train_loss));
  write("loss-name", model.loss);
  const { classes } = model.metrics.fading || {};
  write("sigma", classes === undefined ? number(model.noise_sigma_label_units) : count(classes));
  write("sigma-sd", classes === undefined ? `${number(model.noise_sigma)} label sd` : "seen recently");
  remember(model);
  showErrors();
  draw();
  question.refresh(model);
}

const errorsShown = () => heard.model.metrics[document.querySelector("input[name=window]:checked").value] || {};

function showErrors() {
  const errors = errorsShown();
  const rows = task.rows.map(([key, name]) => {
    const values = task.answers.map(([answer]) => (errors[answer] || {})[key] ?? null);
    const known = values.filter((value) => value !== null);
    const row = document.createElement("tr");
    const head = element("th", "", name);
    head.scope = "row";
    row.append(head);
    for (const value of values) {
      const best = known.length > 1 && value === task.best(...known);
      row.append(element("td", best ? "best" : "", number(value)));
    }
    return row;
  });
  byId("errors").replaceChildren(...rows);
}

function remember(model) {
  const errors = model.metrics.fading || {};
  const now = Date.now() / 1000;
  task.answers.forEach(([answer], i) => {
    const value = (errors[answer] || {})[task.followed];
    if (value !== null && value !== undefined) history[i].values.push([now, value]);
    if (history[i].values.length > HISTORY) history[i].values.shift();
  });
  if (alarms !== null && model.drift_alarms > alarms) drifts.push(now);
  alarms = model.drift_alarms;
}

function draw() {
  const { model, page } = heard;
  if (!model || !page) return;
  const [first] = history[0].values[0] ?? [Infinity];
  charts.lines(byId("history"), history, drifts.filter((at) => at >= first));
  byId("drift-legend").hidden = !drifts.length;
  const classes = page.task === "classification";
  byId("regions-card").hidden = classes;
  byId("scatter").hidden = classes;
  byId("newest").hidden = !classes;
  byId("scatter-card").classList.toggle("wide", classes);
  if (classes) showNewest(model.newest);
  else drawNumbers(model, page);
}

function drawNumbers(model, page) {
  const points = model.newest;
  write("scatter-hint", `Predicted ${page.label} (upwards) against the true one; on the dashed line they agree.`);
  byId("scatter").setAttribute("aria-label", `Predictions against labels of the newest ${points.length} records`);
  charts.scatter(byId("scatter"), points);
  const { regions } = errorsShown();
  if (!regions) return;
  const from = `${page.label} from ${number(regions.low)} to ${number(regions.high)}`;
  byId("regions").setAttribute("aria-label", `Labels and mean absolute error by region, ${from}`);
  const errors = task.answers.map(([answer, name, dash]) => ({ name, dash, values: regions[answer] }));
  charts.regions(byId("regions"), regions, errors);
}

/** Newest classes beside what was said of them, the newest first. */
function showNewest(samples) {
  write("scatter-hint", "What came, and where it was not what had been predicted, what had.");
  const marks = samples.slice(-NEWEST).reverse().map(({ label, prediction }) => {
    const right = label === prediction;
    return element("li", right ? "right" : "wrong", right ? `✓ ${label}` : `${label}, not ${prediction}`);
  });
  byId("newest").replaceChildren(...marks);
}

function redraw() {
  draw();
  question.draw();
}

for (const input of document.querySelectorAll("input[name=window]")) {
  input.addEventListener("change", () => {
    showErrors();
    draw();
  });
}
new ResizeObserver(redraw).observe(byId("live"));
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
