// The charts, drawn by uPlot (a global of its own script). Colours are the style sheet's, read again when they change.

import { minus } from "./page.js";

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const plain = (value) => minus(compact.format(value));
const FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";

const made = new Map(); // charts by the element that they are in
const states = new WeakMap(); // what the options of a chart read, by the same element; renewed with the data
const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.clientWidth) made.get(target).setSize(sizeOf(target));
});
const sizeOf = (place) => ({ width: place.clientWidth, height: place.clientHeight });

const colours = new Map();
const colour = (name) => () => {
  if (!colours.has(name)) colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return colours.get(name);
};
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  colours.clear();
  for (const chart of made.values()) chart.redraw(false);
});

/**
 * Shows data in the chart of a place, which is made the first time; nothing while the place has no room.
 *
 * options(now) is asked for once, and reads from `now` the state that came with the newest data.
 */
function show(place, data, state, options) {
  if (!place.clientWidth) return;
  if (!states.has(place)) states.set(place, {});
  const now = Object.assign(states.get(place), state);
  if (made.has(place)) {
    made.get(place).setData(data);
    return;
  }
  const chart = new uPlot({ legend: { show: false }, ...sizeOf(place), ...options(now) }, data, place);
  made.set(place, chart);
  resized.observe(place);
}

const axis = (more) => ({
  stroke: colour("soft"), font: FONT, labelFont: FONT, labelSize: 18, labelGap: 2, size: 48, gap: 6, ticks: { show: false },
  grid: { stroke: colour("line"), width: 1 }, values: (_, values) => values.map((value) => (value === null ? "" : plain(value))),
  ...more,
});
const along = (more) => axis({ size: 30, gap: 10, grid: { show: false }, space: 70, ...more });
const line = (name, dash, more = {}) => ({ stroke: colour(name), width: 2, dash, points: { show: false }, ...more });
const cursor = (more = {}) => ({ y: false, drag: { x: false, y: false }, points: { size: 7 }, ...more });
const fromZero = (_, __, high) => [0, high * 1.08 || 1];

/** Draws in the chart's own pixels, within its axes. */
function within(chart, drawing) {
  const { ctx, bbox } = chart;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  drawing(ctx, bbox, uPlot.pxRatio);
  ctx.restore();
}

function upright(chart, at, name, dash = [], width = 1.5) {
  within(chart, (ctx, { top, height }, ratio) => {
    const x = Math.round(chart.valToPos(at, "x", true));
    ctx.strokeStyle = colour(name)();
    ctx.lineWidth = width * ratio;
    ctx.setLineDash(dash.map((part) => part * ratio));
    ctx.beginPath();
    ctx.moveTo(x, top);
    ctx.lineTo(x, top + height);
    ctx.stroke();
  });
}

const clock = (seconds, options) => new Intl.DateTimeFormat("en-GB", options).format(seconds * 1000);
const SECONDS = { hour: "2-digit", minute: "2-digit", second: "2-digit" };
const MINUTES = { hour: "2-digit", minute: "2-digit" };
const DAYS = { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" };
export const moment = (seconds) => clock(seconds, Date.now() / 1000 - seconds > 72000 ? DAYS : SECONDS);
const moments = (_, values, __, ___, step) =>
  values.map((value) => clock(value, step < 60 ? SECONDS : step < 21600 ? MINUTES : DAYS));

/**
 * Lines over seconds; `series` is [{name, dash, values}], a name is a colour. `marks` are seconds of drift alarms, and
 * {label, tick} names the axis of the values and says how they are written.
 * onLook(index) says which point the pointer is at, null where at none.
 */
export function lines(place, times, series, marks, { label, tick = plain }, onLook) {
  show(place, [times, ...series.map(({ values }) => values)], { marks, label }, (now) => ({
    padding: [8, 24, 0, 0],
    scales: { x: { time: true, range: (_, low, high) => [low, Math.max(high, low + 10)] }, y: { range: fromZero } },
    axes: [along({ values: moments, space: 90 }), axis({ label: () => now.label, space: 36, values: (_, values) => values.map(tick) })],
    series: [{}, ...series.map(({ name, dash }) => line(name, dash, { spanGaps: true }))],
    cursor: cursor(),
    hooks: {
      setCursor: [(chart) => onLook(chart.cursor.idx ?? null)],
      draw: [(chart) => now.marks.forEach((at) => upright(chart, at, "bad", [2, 3]))],
    },
  }));
}

/** A line without axes, filled below. */
export function spark(place, times, values) {
  show(place, [times, values], {}, () => ({
    padding: [3, 0, 3, 0],
    scales: { x: { time: false }, y: { range: (_, low, high) => [Math.min(0, low), high * 1.05 || 1] } },
    axes: [{ show: false }, { show: false }],
    series: [{}, line("accent", [], { width: 1.5, spanGaps: true, fill: colour("accent-wash") })],
    cursor: { show: false },
  }));
}

/** Predictions against labels, both axes alike; on the diagonal they agree. The newest stand out. */
export function scatter(place, points, newest, names) {
  const sorted = points.map((point, i) => ({ ...point, fresh: i >= points.length - newest }));
  sorted.sort((one, other) => one.label - other.label);
  const of = (fresh) => sorted.map((point) => (point.fresh === fresh ? point.prediction : null));
  const values = sorted.flatMap(({ label, prediction }) => [label, prediction]);
  const low = Math.min(...values), high = Math.max(...values);
  const margin = (high - low) * 0.04 || 1;
  const state = { limits: [low - margin, high + margin], names };
  const dots = (name, size) => ({
    stroke: colour(name), paths: () => null, points: { show: true, size, width: 0, fill: colour(name), stroke: colour(name) },
  });
  show(place, [sorted.map(({ label }) => label), of(false), of(true)], state, (now) => ({
    padding: [8, 12, 0, 0],
    scales: { x: { time: false, range: () => now.limits }, y: { range: () => now.limits } },
    axes: [along({ label: () => now.names[0] }), axis({ label: () => now.names[1] })],
    series: [{}, dots("stream-wash", 6), dots("stream", 8)],
    cursor: { show: false },
    hooks: { drawAxes: [diagonal] },
  }));
}

function diagonal(chart) {
  const [low, high] = [chart.scales.x.min, chart.scales.x.max];
  within(chart, (ctx, _, ratio) => {
    ctx.strokeStyle = colour("constant")();
    ctx.lineWidth = ratio;
    ctx.setLineDash([4 * ratio, 4 * ratio]);
    ctx.beginPath();
    ctx.moveTo(chart.valToPos(low, "x", true), chart.valToPos(low, "y", true));
    ctx.lineTo(chart.valToPos(high, "x", true), chart.valToPos(high, "y", true));
    ctx.stroke();
  });
}

/**
 * How many labels lie where, on a logarithmic scale, and the error there: a histogram, and lines over it.
 *
 * `bins` is {low, high, rows: [...]} of equally wide regions; `series` is [{name, dash, values: [error or null, ...]}],
 * and the first two of them fit in: the error of the running median grows with every step away from it.
 * onLook(region) says which region the pointer is at, null where at none.
 */
export function regions(place, bins, series, names, onLook) {
  const { low, high, rows } = bins;
  const width = (high - low) / rows.length || 1;
  // Wide where most labels are, narrower the farther away: a label ten times as far should not take ten times the room.
  const centre = low + (rows.indexOf(Math.max(...rows)) + 0.5) * width;
  const state = {
    ends: [low, high],
    names,
    last: rows.length - 1,
    squeeze: (label) => Math.asinh((label - centre) / (4 * width)),
    stretch: (x) => centre + 4 * width * Math.sinh(x),
    worst: Math.max(...series.slice(0, 2).flatMap(({ values }) => values.map((value) => value ?? 0))) * 1.25 || 1,
    most: Math.max(10, ...rows),
  };
  // Edges of the regions and their middles, in turns: the histogram has steps at the one, the lines points at the other.
  const xs = [], counts = [], errors = series.map(() => []);
  for (let i = 0; i <= rows.length; i++) {
    xs.push(state.squeeze(low + i * width));
    counts.push(Math.log10(1 + rows[Math.min(i, state.last)]));
    errors.forEach((values) => values.push(undefined));
    if (i === rows.length) break;
    xs.push(state.squeeze(low + (i + 0.5) * width));
    counts.push(Math.log10(1 + rows[i]));
    errors.forEach((values, j) => values.push(series[j].values[i] ?? null));
  }
  show(place, [xs, counts, ...errors], state, (now) => ({
    padding: [8, 0, 0, 0],
    scales: {
      x: { time: false, range: (_, from, to) => [from, to] },
      y: { range: () => [0, now.worst] },
      rows: { range: () => [0, Math.log10(1 + now.most) * 1.05] },
    },
    axes: [
      along({
        label: () => now.names[0],
        splits: (chart) => labelTicks(chart, now),
        values: (_, places) => places.map((x) => plain(round(now.stretch(x)))),
      }),
      axis({ label: () => now.names[1] }),
      axis({
        side: 1, scale: "rows", grid: { show: false }, label: "labels", size: 42,
        splits: () => decades(now.most).map((count) => Math.log10(1 + count)),
        values: (_, values) => values.map((value) => plain(Math.round(10 ** value - 1))),
      }),
    ],
    series: [
      {},
      { scale: "rows", paths: uPlot.paths.stepped({ align: 1 }), fill: colour("bars"), width: 0, points: { show: false } },
      ...series.map(({ name, dash }) => line(name, dash, { points: { show: true, size: 5, width: 0, fill: colour(name) } })),
    ],
    cursor: cursor({ points: { show: false } }),
    hooks: { setCursor: [(chart) => onLook(chart.cursor.idx == null ? null : Math.min(chart.cursor.idx >> 1, now.last))] },
  }));
}

const round = (value) => Number(value.toPrecision(10));
const decades = (most) => Array.from({ length: Math.ceil(Math.log10(most + 1)) }, (_, i) => 10 ** i);

/** Round labels, from the coarsest, as many as there is room for. */
function labelTicks(chart, { ends: [low, high], squeeze }) {
  const room = 44 / (chart.bbox.width / uPlot.pxRatio) * (squeeze(high) - squeeze(low));
  const taken = [];
  for (const count of [5, 20, 60]) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw);
    for (let i = Math.ceil(low / step); i * step <= high; i++) {
      const x = squeeze(i * step);
      if (taken.every((other) => Math.abs(other - x) > room)) taken.push(x);
    }
  }
  return taken.sort((one, other) => one - other);
}

/** Predictive densities, [{edges, probabilities}]: `answer` filled, with its point and interval, and its two `ends`. */
export function density(place, answer, ends, label) {
  const shapes = [answer, ...ends].map(outline);
  const [mine] = shapes;
  const { lower, upper, prediction } = answer;
  const limits = [Math.min(lower, ...shapes.map(({ low }) => low)), Math.max(upper, ...shapes.map(({ high }) => high))];
  const interval = [lower, ...mine.xs.filter((x) => x > lower && x < upper), upper];
  const tables = shapes.map(({ xs, heights }) => [xs, heights]);
  const data = uPlot.join([...tables, [interval, interval.map((x) => interpolated(mine, x))]]);
  show(place, data, { limits, label, prediction }, (now) => ({
    padding: [10, 12, 0, 12],
    scales: { x: { time: false, range: () => now.limits }, y: { range: fromZero } },
    axes: [along({ label: () => now.label, border: { show: true, stroke: colour("line"), width: 1 } }), { show: false }],
    series: [
      {},
      line("mine", [], { width: 2.5, fill: colour("mine-wash") }),
      line("stream", [], { width: 1.5 }),
      line("balanced", [7, 4], { width: 1.5 }),
      { fill: colour("mine-interval"), width: 0, points: { show: false } },
    ].map((series) => ({ ...series, spanGaps: true })),
    cursor: { show: false },
    hooks: { draw: [(chart) => upright(chart, now.prediction, "mine", [], 2)] },
  }));
}

const REST = 0.002; // of the probability beyond either end of what is drawn

/** A density's height in the middle of each cell, and where nearly all of it lies. */
function outline({ edges, probabilities }) {
  const xs = probabilities.map((_, i) => (edges[i] + edges[i + 1]) / 2);
  const heights = probabilities.map((share, i) => share / (edges[i + 1] - edges[i]));
  let low = edges[0], high = edges.at(-1), sum = 0;
  probabilities.forEach((share, i) => {
    if (sum <= REST && sum + share > REST) low = edges[i];
    if (sum < 1 - REST && sum + share >= 1 - REST) high = edges[i + 1];
    sum += share;
  });
  return { xs, heights, low, high };
}

function interpolated({ xs, heights }, x) {
  const after = xs.findIndex((other) => other >= x);
  if (after <= 0) return after ? heights.at(-1) : heights[0];
  const share = (x - xs[after - 1]) / (xs[after] - xs[after - 1]);
  return heights[after - 1] + share * (heights[after] - heights[after - 1]);
}
