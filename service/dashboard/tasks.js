// What differs on the page between labels that are numbers and labels that are classes.

const BALANCES = [["0", "stream", []], ["1", "balanced", [7, 4]]]; // an answer, its colour, its dashes

const NUMBERS = {
  title: "Mean absolute error",
  history: "Error since this page was opened",
  constant: "Running median",
  sigma: "Noise σ",
  alike: "Regions alike",
  answers: [...BALANCES, ["median", "constant", [2, 3]]],
  rows: [
    ["mae", "all labels"],
    ["mae_many", "frequent"],
    ["mae_medium", "less frequent"],
    ["mae_few", "rare"],
    ["balanced_mae", "regions alike"],
  ],
  followed: "mae",
  best: Math.min,
  kept: ["mae", "balanced_mae"], // of a version: at balance 0, and with regions alike at balance 1
  keptTitle: "MAE",
};

const CLASSES = {
  title: "Share answered right",
  history: "Mean recall of classes since this page was opened",
  constant: "Most frequent class",
  sigma: "Classes",
  alike: "Classes alike",
  answers: [...BALANCES, ["majority", "constant", [2, 3]]],
  rows: [
    ["accuracy", "all labels"],
    ["recall_many", "frequent"],
    ["recall_medium", "less frequent"],
    ["recall_few", "rare"],
    ["macro_recall", "classes alike"],
  ],
  followed: "macro_recall",
  best: Math.max,
  kept: ["accuracy", "macro_recall"],
  keptTitle: "Accuracy",
};

export const taskOf = (page) => (page.task === "classification" ? CLASSES : NUMBERS);
