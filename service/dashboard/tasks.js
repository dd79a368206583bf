// What differs on the page between labels that are numbers and labels that are classes.

import { minus } from "./page.js";

// An answer, its colour, its dashes, and what it is called.
const BALANCES = [["0", "stream", [], "stream’s prior"], ["1", "balanced", [7, 4], "balanced"]];

/** With as many places as tell the smallest of some values to three digits, the same for all of them. */
function alike(values) {
  const least = Math.min(...values.filter((value) => value).map(Math.abs));
  const places = Number.isFinite(least) ? Math.min(Math.max(2 - Math.floor(Math.log10(least)), 0), 6) : 0;
  const format = new Intl.NumberFormat("en", { minimumFractionDigits: places, maximumFractionDigits: places });
  return (value) => (value === null || value === undefined ? "–" : minus(format.format(value)));
}

const percent = () => (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);

const NUMBERS = {
  title: "Mean absolute error",
  constant: "Running median",
  sigma: "Noise σ",
  answers: [...BALANCES, ["median", "constant", [2, 3], "running median"]],
  rows: [
    ["mae", "All labels", ""],
    ["mae_many", "Frequent", "many"],
    ["mae_medium", "Less frequent", "medium"],
    ["mae_few", "Rare", "few"],
    ["balanced_mae", "Regions alike", "balanced"],
  ],
  followed: { all: "mae", alike: "balanced_mae" },
  alikeTitle: "regions alike",
  format: alike,
  best: Math.min,
  verdict: (mine, constant) => (mine < constant ? `${Math.round(100 * (1 - mine / constant))} % below` : `${Math.round(100 * (mine / constant - 1))} % above`),
  kept: ["mae", "balanced_mae"], // of a version: at balance 0, and with regions alike at balance 1
  keptTitles: ["MAE", "Balanced MAE"],
};

const CLASSES = {
  title: "Share answered right",
  constant: "Most frequent class",
  sigma: "Classes",
  answers: [...BALANCES, ["majority", "constant", [2, 3], "most frequent class"]],
  rows: [
    ["accuracy", "All labels", ""],
    ["recall_many", "Frequent", "many"],
    ["recall_medium", "Less frequent", "medium"],
    ["recall_few", "Rare", "few"],
    ["macro_recall", "Classes alike", "balanced"],
  ],
  followed: { all: "accuracy", alike: "macro_recall" },
  alikeTitle: "classes alike",
  tick: (value) => `${Math.round(100 * value)} %`,
  format: percent,
  best: Math.max,
  verdict: (mine, constant) => `${(100 * (mine - constant)).toFixed(0)} points ${mine < constant ? "below" : "above"}`,
  kept: ["accuracy", "macro_recall"],
  keptTitles: ["Accuracy", "Mean recall"],
};

export const taskOf = (page) => (page.task === "classification" ? CLASSES : NUMBERS);
