// What is drawn over time: the service's memory when the page opens, then a point of each new model.

import * as charts from "./charts.js";
import { byId, write } from "./page.js";

const MOST = 1200; // points; past it every second one goes
const SPARKS = ["samples_per_second", "lag_records", "freshness_s", "train_loss", "noise_sigma_label_units"];

let columns = { time_s: [] };
let task = null;
let looked = null; // the point that the pointer is at

export function begin(past) {
  columns = past.time_s ? past : { time_s: [] };
}

/** Notes a point, unless it is older than what is there: of a version rolled back to. */
export function add(point) {
  const { time_s: times } = columns;
  if (times.length && point.time_s <= times.at(-1)) return;
  for (const [name, value] of Object.entries(point)) (columns[name] ??= times.map(() => null)).push(value);
  if (times.length <= MOST) return;
  for (const name of Object.keys(columns)) columns[name] = columns[name].filter((_, i) => i % 2 === 0);
}

/** When the trainer raised an alarm, seconds. */
const drifts = () => columns.time_s.filter((_, i) => i && columns.drift_alarms[i] > columns.drift_alarms[i - 1]);

const followed = () => task.followed[document.querySelector("input[name=followed]:checked").value];

export function draw(ofTask) {
  task = ofTask;
  const { time_s: times } = columns;
  if (!times.length) return;
  for (const name of SPARKS) {
    const place = byId(`spark-${name}`);
    if (place) charts.spark(place, times, columns[name]);
  }
  const marks = drifts();
  byId("drift-legend").hidden = !marks.length;
  const series = task.answers.map(([answer, name, dash]) => ({ name, dash, values: columns[`${followed()}.${answer}`] ?? [] }));
  charts.lines(byId("history"), times, series, marks, { label: task.title.toLowerCase(), tick: task.tick }, look);
  tell();
}

function look(index) {
  looked = index;
  tell();
}

/** The legend's values: at the pointer, else the newest. */
function tell() {
  const { time_s: times } = columns;
  const at = looked === null || looked >= times.length ? times.length - 1 : looked;
  const known = task.answers.map(([answer]) => columns[`${followed()}.${answer}`]?.[at] ?? null);
  const format = task.format(known);
  task.answers.forEach(([, name], i) => write(`history-${name}`, format(known[i])));
  write("history-at", looked === null ? "" : charts.moment(times[at]));
  const said = task.answers.map(([, , , title], i) => `${title} ${format(known[i])}`).join(", ");
  byId("history").setAttribute("aria-label", `${task.title} over time; newest: ${said}`);
}

for (const input of document.querySelectorAll("input[name=followed]")) input.addEventListener("change", () => draw(task));
