"use strict";

// Two small charts on canvases. Colours are the style sheet's, so that dark mode needs nothing here.

const Charts = (() => {
  const PAD = { left: 46, right: 10, top: 8, bottom: 26 };

  function begin(canvas) {
    const scale = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = canvas;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    context.font = "12px system-ui, sans-serif";
    return { context, colour, width, height };
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

  const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

  function axes(chart, x, y, xTicks, yTicks, xText = short.format) {
    const { context, colour, width, height } = chart;
    context.strokeStyle = colour("line");
    context.fillStyle = colour("soft");
    context.lineWidth = 1;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const tick of yTicks) {
      context.beginPath();
      context.moveTo(PAD.left, y(tick));
      context.lineTo(width - PAD.right, y(tick));
      context.stroke();
      context.fillText(short.format(tick), PAD.left - 8, y(tick));
    }
    context.textBaseline = "top";
    for (const tick of xTicks) {
      const text = xText(tick);
      const half = context.measureText(text).width / 2;
      context.textAlign = "left";
      context.fillText(text, Math.min(Math.max(x(tick) - half, 0), width - 2 * half), height - PAD.bottom + 8);
    }
  }

  const between = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);

  /** Predictions against labels, both axes alike; on the diagonal they agree. */
  function scatter(canvas, points) {
    const chart = begin(canvas);
    if (!points.length) return;
    const { context, colour, width, height } = chart;
    const values = points.flatMap((point) => [point.label, point.prediction]);
    let low = Math.min(...values), high = Math.max(...values);
    const margin = (high - low) * 0.05 || 1;
    low -= margin; high += margin;
    const x = between(low, high, PAD.left, width - PAD.right);
    const y = between(low, high, height - PAD.bottom, PAD.top);
    axes(chart, x, y, ticks(low, high, 6), ticks(low, high, 5));
    context.strokeStyle = colour("median");
    context.setLineDash([4, 4]);
    context.beginPath();
    context.moveTo(x(low), y(low));
    context.lineTo(x(high), y(high));
    context.stroke();
    context.setLineDash([]);
    context.fillStyle = colour("stream");
    points.forEach((point, i) => {
      context.globalAlpha = 0.25 + 0.6 * ((i + 1) / points.length); // the newest stand out
      context.beginPath();
      context.arc(x(point.label), y(point.prediction), 3.5, 0, 2 * Math.PI);
      context.fill();
    });
    context.globalAlpha = 1;
  }

  /** Lines over seconds: `series` is [{name, dash, values: [[seconds, value], ...]}]; names are colours. */
  function lines(canvas, series) {
    const chart = begin(canvas);
    const points = series.flatMap((line) => line.values);
    if (!points.length) return;
    const { context, colour, width, height } = chart;
    const start = Math.min(...points.map((point) => point[0]));
    const end = Math.max(start + 10, ...points.map((point) => point[0]));
    const high = Math.max(...points.map((point) => point[1])) * 1.08 || 1;
    const x = between(start, end, PAD.left, width - PAD.right);
    const y = between(0, high, height - PAD.bottom, PAD.top);
    const clock = (seconds) => (end - seconds < 0.5 ? "now" : `−${Charts.duration(end - seconds)}`);
    axes(chart, x, y, [start, (start + end) / 2, end], ticks(0, high, 5), clock);
    context.lineWidth = 2;
    context.lineJoin = "round";
    for (const line of series) {
      context.strokeStyle = colour(line.name);
      context.setLineDash(line.dash);
      context.beginPath();
      line.values.forEach(([seconds, value], i) => {
        if (i) context.lineTo(x(seconds), y(value));
        else context.moveTo(x(seconds), y(value));
      });
      context.stroke();
    }
    context.setLineDash([]);
  }

  /** Seconds for people. */
  function duration(seconds) {
    if (seconds < 1) return `${seconds.toFixed(1)} s`;
    if (seconds < 120) return `${Math.round(seconds)} s`;
    if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
    if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
    return `${Math.round(seconds / 86400)} days`;
  }

  return { scatter, lines, duration };
})();
