// Four small charts on canvases. Colours are the style sheet's, so that dark mode needs nothing here.

import { duration, minus } from "./page.js";

const PAD = { left: 46, right: 10, top: 8, bottom: 26 };
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const plain = (value) => minus(compact.format(value));

function begin(canvas, right = PAD.right) {
  const scale = window.devicePixelRatio || 1;
  const { clientWidth, clientHeight: height } = canvas;
  canvas.width = Math.round(clientWidth * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.font = "12px system-ui, sans-serif";
  context.lineJoin = "round";
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  return { context, colour, width: clientWidth, height, end: clientWidth - right, bottom: height - PAD.bottom };
}

/** Round numbers between two values, about `count` of them. */
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step + 0); // no −0
  return found;
}

const between = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);

function rowsOf(chart, y, values) {
  const { context, colour, end } = chart;
  context.strokeStyle = colour("line");
  context.fillStyle = colour("soft");
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const value of values) {
    context.beginPath();
    context.moveTo(PAD.left, Math.round(y(value)) + 0.5);
    context.lineTo(end, Math.round(y(value)) + 0.5);
    context.stroke();
    context.fillText(plain(value), PAD.left - 8, y(value));
  }
}

/** Writes values below the chart, those that come first with precedence: none is written over another. */
function columnsOf(chart, x, values, text = plain) {
  const { context, colour, width, bottom } = chart;
  context.fillStyle = colour("soft");
  context.textAlign = "left";
  context.textBaseline = "top";
  const taken = [];
  for (const value of values) {
    const size = context.measureText(text(value)).width;
    const left = Math.min(Math.max(x(value) - size / 2, 0), width - size);
    if (taken.some(([from, to]) => left < to + 14 && left + size > from - 14)) continue;
    context.fillText(text(value), left, bottom + 8);
    taken.push([left, left + size]);
  }
}

/** A line through points; it breaks where one is null. */
function stroke(chart, { name, dash = [] }, points, thickness = 2) {
  const { context, colour } = chart;
  context.strokeStyle = colour(name);
  context.lineWidth = thickness;
  context.setLineDash(dash);
  context.beginPath();
  let drawing = false;
  for (const point of points) {
    if (point && drawing) context.lineTo(...point);
    else if (point) context.moveTo(...point);
    drawing = Boolean(point);
  }
  context.stroke();
  context.setLineDash([]);
}

/** Predictions against labels, both axes alike; on the diagonal they agree. */
export function scatter(canvas, points) {
  if (!points.length) return;
  const chart = begin(canvas);
  const { context, colour, end, bottom } = chart;
  const values = points.flatMap((point) => [point.label, point.prediction]);
  const low = Math.min(...values), high = Math.max(...values);
  const x = between(low, high, PAD.left + 6, end - 6);
  const y = between(low, high, bottom - 6, PAD.top + 6);
  rowsOf(chart, y, ticks(low, high, 5));
  columnsOf(chart, x, ticks(low, high, 6));
  stroke(chart, { name: "constant", dash: [4, 4] }, [[x(low), y(low)], [x(high), y(high)]], 1);
  context.fillStyle = colour("stream");
  points.forEach((point, i) => {
    context.globalAlpha = 0.25 + 0.6 * ((i + 1) / points.length); // the newest stand out
    context.beginPath();
    context.arc(x(point.label), y(point.prediction), 3.5, 0, 2 * Math.PI);
    context.fill();
  });
  context.globalAlpha = 1;
}

/** Lines over seconds: `series` is [{name, dash, values: [[seconds, value], ...]}], names are colours; and marks. */
export function lines(canvas, series, marks = []) {
  const points = series.flatMap((line) => line.values);
  if (!points.length) return;
  const chart = begin(canvas);
  const start = Math.min(...points.map((point) => point[0]));
  const end = Math.max(start + 10, ...points.map((point) => point[0]));
  const high = Math.max(...points.map((point) => point[1])) * 1.08 || 1;
  const x = between(start, end, PAD.left, chart.end);
  const y = between(0, high, chart.bottom, PAD.top);
  const clock = (seconds) => (end - seconds < 0.5 ? "now" : `−${duration(end - seconds)}`);
  rowsOf(chart, y, ticks(0, high, 5));
  columnsOf(chart, x, [start, (start + end) / 2, end], clock);
  for (const at of marks) stroke(chart, { name: "bad" }, [[x(at), PAD.top], [x(at), chart.bottom]], 1.5);
  for (const line of series) stroke(chart, line, line.values.map(([seconds, value]) => [x(seconds), y(value)]));
}

/**
 * How many labels lie where, on a logarithmic scale, and the error there: bars, and lines over them.
 *
 * `bins` is {low, high, rows: [...]} of equally wide regions; `series` is [{name, dash, values: [error or null, ...]}],
 * and the first two of them fit in: the error of the running median grows with every step away from it.
 */
export function regions(canvas, bins, series) {
  const chart = begin(canvas, PAD.left);
  const { context, end, bottom } = chart;
  const { low, high, rows } = bins;
  const width = (high - low) / rows.length || 1;
  const worst = Math.max(...series.slice(0, 2).flatMap((line) => line.values.map((value) => value ?? 0))) * 1.25 || 1;
  const most = Math.max(10, ...rows);
  const y = between(0, worst, bottom, PAD.top);
  const height = between(0, Math.log10(1 + most) * 1.05, bottom, PAD.top);
  // Wide where most labels are, narrower the farther away: a label ten times as far should not take ten times the room.
  const centre = low + (rows.indexOf(Math.max(...rows)) + 0.5) * width;
  const squeezed = (label) => Math.asinh((label - centre) / (4 * width));
  const placed = between(squeezed(low), squeezed(high), PAD.left, end);
  const x = (label) => placed(squeezed(label));
  const edge = (i) => x(low + i * width);

  context.fillStyle = chart.colour("bars");
  rows.forEach((count, i) => {
    const top = height(Math.log10(1 + count));
    context.fillRect(edge(i) + 0.5, top, Math.max(1, edge(i + 1) - edge(i) - 1), bottom - top);
  });
  rowsOf(chart, y, ticks(0, worst, 5));
  columnsOf(chart, x, [5, 20, 60].flatMap((count) => ticks(low, high, count)));
  context.textAlign = "left";
  context.textBaseline = "middle";
  for (let count = 1; count <= most; count *= 10) context.fillText(plain(count), end + 8, height(Math.log10(1 + count)));
  inside(chart, PAD.left, end, () => {
    for (const line of series) {
      const points = line.values.map((value, i) => (value === null ? null : [x(low + (i + 0.5) * width), y(value)]));
      stroke(chart, line, points);
      context.fillStyle = chart.colour(line.name);
      points.forEach((point, i) => {
        if (!point || points[i - 1] || points[i + 1]) return;
        context.beginPath(); // alone, it would be a line of no length
        context.arc(...point, 2, 0, 2 * Math.PI);
        context.fill();
      });
    }
  });
}

/** Draws what must not leave the part of the chart between two columns. */
function inside(chart, left, right, drawing) {
  const { context, bottom } = chart;
  context.save();
  context.beginPath();
  context.rect(left, 0, right - left, bottom);
  context.clip();
  drawing();
  context.restore();
}

/** Probabilities of classes, [[name, share], ...]: bars, each with a stroke where it ends at either of the `ends`. */
export function shares(canvas, mine, ends) {
  const chart = begin(canvas);
  const { context, colour, end } = chart;
  const pace = Math.min((chart.height - PAD.top) / mine.length, 34);
  const left = Math.min(Math.max(...mine.map(([name]) => context.measureText(name).width)) + 12, chart.width / 3);
  const x = between(0, 1, left, end - 44);
  context.textBaseline = "middle";
  mine.forEach(([name, share], i) => {
    const middle = PAD.top + (i + 0.5) * pace;
    context.fillStyle = colour("soft");
    context.textAlign = "right";
    context.fillText(name, left - 10, middle, left - 10);
    context.textAlign = "left";
    context.fillText(`${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`, x(1) + 8, middle);
    context.fillStyle = colour("wash");
    context.fillRect(left, middle - pace * 0.3, x(1) - left, pace * 0.6);
    context.fillStyle = colour("mine");
    context.fillRect(left, middle - pace * 0.3, x(share) - left, pace * 0.6);
    ["stream", "balanced"].forEach((end, j) => {
      const at = x(ends[j]?.[name] ?? 0);
      stroke(chart, { name: end }, [[at, middle - pace * 0.42], [at, middle + pace * 0.42]], 3);
    });
  });
}

/** Predictive densities, [{edges, probabilities}]: `answer` filled, with its point and interval, over its two `ends`. */
export function density(canvas, answer, ends) {
  const chart = begin(canvas);
  const { end, bottom } = chart;
  const shapes = [answer, ...ends].map(outline);
  const low = Math.min(...shapes.map((shape) => shape.low), answer.lower);
  const high = Math.max(...shapes.map((shape) => shape.high), answer.upper);
  const shown = ([label]) => label >= low && label <= high;
  const peak = Math.max(...shapes.flatMap((shape) => shape.points.filter(shown).map((point) => point[1])));
  const x = between(low, high, PAD.right, end);
  const y = between(0, peak * 1.08, bottom, PAD.top);
  const path = (shape) => shape.points.map(([label, value]) => [x(label), y(value)]);
  const [mine, ...others] = shapes.map(path);
  stroke(chart, { name: "line" }, [[PAD.right, bottom + 0.5], [end, bottom + 0.5]], 1);
  columnsOf(chart, x, ticks(low, high, 6));
  inside(chart, PAD.right, end, () => {
    fill(chart, mine, 0.1);
    inside(chart, x(answer.lower), x(answer.upper), () => fill(chart, mine, 0.3)); // the interval is what is darker
    const names = [{ name: "stream" }, { name: "balanced", dash: [7, 4] }];
    others.forEach((points, i) => stroke(chart, names[i], points, 1.5));
    stroke(chart, { name: "mine" }, mine, 2.5);
    const at = x(answer.prediction);
    stroke(chart, { name: "mine" }, [[at, PAD.top], [at, bottom]], 1.5);
  });
}

function fill(chart, points, alpha) {
  const { context, colour, bottom } = chart;
  context.fillStyle = colour("mine");
  context.globalAlpha = alpha;
  context.beginPath();
  context.moveTo(points[0][0], bottom);
  for (const point of points) context.lineTo(...point);
  context.lineTo(points.at(-1)[0], bottom);
  context.fill();
  context.globalAlpha = 1;
}

const REST = 0.002; // of the probability beyond either end of what is drawn

/** A density's height in the middle of each cell, and where nearly all of it lies. */
function outline({ edges, probabilities }) {
  const points = probabilities.map((share, i) => [(edges[i] + edges[i + 1]) / 2, share / (edges[i + 1] - edges[i])]);
  let low = edges[0], high = edges.at(-1), sum = 0;
  probabilities.forEach((share, i) => {
    if (sum <= REST && sum + share > REST) low = edges[i];
    if (sum < 1 - REST && sum + share >= 1 - REST) high = edges[i + 1];
    sum += share;
  });
  return { points, low, high };
}
