// The page: what the service's events say, put where it belongs.

import * as charts from "./charts.js";
import { follow } from "./events.js";
import * as history from "./history.js";
import { askForKey, byId, count, duration, element, keepKey, number, write } from "./page.js";
import * as question from "./question.js";
import { taskOf } from "./tasks.js";
import * as versions from "./versions.js";

const QUIET_S = 15; // without a new snapshot for this long the page says so
const NEWEST = 40; // classes that are shown
const FRESH = 20; // points of the newest labels that stand out

// The newest event of each kind; `model` is null while there is none, `lost` is why no events come.
const heard = { page: null, history: null, model: null, now: null, lost: null };
let fresh = false; // whether the model has not been shown yet
let task = null; // what the page says of labels of this kind
let looked = null; // the region that the pointer is at

const again = follow(
  (kind, data) => {
    heard[kind] = data;
    heard.lost = null;
    if (kind === "page") build(data);
    if (kind === "history") history.begin(data);
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
  document.title = `${page.label} · Tailstream`;
  write("label", page.label);
  write("topic", page.topic);
  byId("learned").hidden = false;
  write("error-title", task.title);
  write("history-title", `${task.title} over time`);
  write("sigma-title", task.sigma);
  ["kept-title", "alike-title"].forEach((id, i) => write(id, task.keptTitles[i]));
  write("constant-title", task.constant);
  for (const place of document.querySelectorAll(".constant-name")) place.textContent = task.constant.toLowerCase();
  for (const place of document.querySelectorAll(".alike-name")) place.textContent = task.alikeTitle;
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
      ? `, though ${count(model.lag_records)} records were waiting: the trainer has stopped, or cannot go on`
      : ": the stream is quiet, or the trainer has stopped";
    const text = `No new snapshot for ${duration(now.age_s)}${why}. Predictions go on with the last model.`;
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
  byId("notice").className = `notice ${kind}`;
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
  write("step", `in ${count(model.step)} steps`);
  write("rate", count(model.samples_per_second));
  write("lag", count(model.lag_records));
  write("loss", number(model.train_loss));
  write("loss-name", model.loss);
  const { classes } = model.metrics.fading || {};
  write("sigma", classes === undefined ? number(model.noise_sigma_label_units) : count(classes));
  write("sigma-sd", classes === undefined ? `${number(model.noise_sigma)} label sd` : "seen recently");
  byId("spark-noise_sigma_label_units").hidden = classes !== undefined;
  history.add(model.point);
  showErrors();
  draw();
  question.refresh(model);
}

const errorsShown = () => heard.model.metrics[document.querySelector("input[name=window]:checked").value] || {};

function showErrors() {
  const errors = errorsShown();
  const value = (answer, key) => (errors[answer] || {})[key] ?? null;
  const format = task.format(task.answers.slice(0, 2).flatMap(([answer]) => task.rows.map(([key]) => value(answer, key))));
  const rows = task.rows.map(([key, name, known]) => {
    const values = task.answers.map(([answer]) => value(answer, key));
    const present = values.filter((found) => found !== null);
    const row = document.createElement("tr");
    const head = element("th", "", name);
    head.scope = "row";
    if (known) head.append(element("small", "", known));
    row.append(head);
    for (const found of values) {
      const best = found === task.best(...present) && present.some((other) => other !== found);
      row.append(element("td", best ? "best" : "", format(found)));
    }
    return row;
  });
  byId("errors").replaceChildren(...rows);
  const constant = task.answers[2][0];
  const { all, alike } = task.followed;
  const claims = [["0", all, "all labels"], ["1", alike, task.alikeTitle]].map(([answer, key, name]) => {
    const [mine, other] = [value(answer, key), value(constant, key)];
    return mine === null || other === null ? "" : `${task.verdict(mine, other)} for ${name}`;
  });
  const said = claims.filter(Boolean).join(", ");
  write("error-verdict", said && `Beside the ${task.constant.toLowerCase()}: ${said}.`);
}

function draw() {
  const { model, page } = heard;
  if (!model || !page) return;
  history.draw(task);
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
  const { label } = page;
  write("scatter-hint", `The newest ${count(points.length)}; on the dashed line they agree.`);
  byId("scatter").setAttribute("aria-label", `Predictions against labels of the newest ${points.length} records`);
  if (points.length) charts.scatter(byId("scatter"), points, FRESH, [`true ${label}`, `predicted ${label}`]);
  const { regions } = errorsShown();
  if (!regions) return;
  const from = `${label} from ${number(regions.low)} to ${number(regions.high)}`;
  byId("regions").setAttribute("aria-label", `Labels and mean absolute error by region, ${from}`);
  const errors = task.answers.map(([answer, name, dash]) => ({ name, dash, values: regions[answer] }));
  charts.regions(byId("regions"), regions, errors, [label, "mean absolute error"], lookAt);
  tellRegion();
}

function lookAt(region) {
  looked = region;
  tellRegion();
}

/** The legend's values: of the region that the pointer is at. */
function tellRegion() {
  const { regions } = errorsShown();
  if (!regions) return;
  const shown = looked !== null && looked < regions.rows.length;
  const width = (regions.high - regions.low) / regions.rows.length;
  const edge = (i) => number(regions.low + i * width);
  const where = `${edge(looked)} to ${edge(looked + 1)}`;
  write("regions-at", shown ? `From ${where}:` : "Point at a region for its figures.");
  write("regions-labels", shown ? count(regions.rows[looked]) : "");
  const known = task.answers.map(([answer]) => regions[answer][looked] ?? null);
  const format = task.format(known);
  task.answers.forEach(([, name], i) => write(`regions-${name}`, shown ? format(known[i]) : ""));
}

/** Newest classes beside what was said of them, the newest first. */
function showNewest(samples) {
  const right = samples.filter(({ label, prediction }) => label === prediction).length;
  write("scatter-hint", `${right} of the newest ${samples.length} predicted right. The newest come first.`);
  const marks = samples.slice(-NEWEST).reverse().map(({ label, prediction }) => {
    const hit = label === prediction;
    return element("li", hit ? "right" : "wrong", hit ? `✓ ${label}` : `✗ ${label}, not ${prediction}`);
  });
  byId("newest").replaceChildren(...marks);
}

for (const input of document.querySelectorAll("input[name=window]")) {
  input.addEventListener("change", () => {
    showErrors();
    draw();
  });
}
// Charts that had no room when the data came are drawn when they have.
new ResizeObserver(() => {
  draw();
  question.draw();
}).observe(byId("live"));
