/* Answers under a label prior on a CPU, and scores of labels: what `predictive` computes with torch in some forty calls
 * each. `tilting.py` loads it.
 *
 * Rows are computed one after the other by the same instructions, so an answer depends on nothing but its row. All
 * arrays are contiguous, and float32 where nothing else is said. Nothing here allocates or keeps state.
 */

#include <math.h>
#include <stdint.h>

#include "gaussians.h"

#define SQRT_HALF 0.707106781186547524f
#define MOST_COMPONENTS 64
#define RELIABLE_TOTAL 1e-15  /* below it what was cut off at the lowest power may matter: the row is done in float64 */
#define LARGEST_TOTAL 0x1p100 /* the same above it, for what was held to the highest power */
#define BLOCK 16             /* cells that are summed in float32 before they join a sum in float64 */

typedef struct {
  float log_height, mean, inverse; /* of sqrt(2) scales */
} Component;

/* The cell that a value lies in: how many of the edges within are below it. */
static int64_t cell_of(const float *edges, int64_t cells, float value) {
  int64_t low = 1, high = cells;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (edges[middle] < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low - 1;
}

/* Adds exp(height + tilt - ((centre - mean) inverse)^2) to the masses of cells.
 *
 * The exponent is kept to where neither the power nor a sum of few of them leaves float32. */
static inline void add_gaussian(int64_t cells, float height, float mean, float inverse, const float *centres,
                                const float *tilts, float *restrict masses) {
#pragma omp simd
  for (int64_t j = 0; j < cells; j++) {
    float distance = (centres[j] - mean) * inverse;
    float power = ((tilts[j] + height) - distance * distance) * LOG2_E;
    power = power > LOWEST_POWER ? power : LOWEST_POWER;
    power = power < HIGHEST_POWER ? power : HIGHEST_POWER;
    masses[j] += power_of_two(power);
  }
}

/* Masses of the cells by logs in float64, the largest 1; the marginal where that is not finite. */
static void write_careful_masses(const Component *components, int64_t count, int64_t cells, const float *centres,
                                 const float *log_tilt, const float *log_marginal, double *logs, float *mass) {
  double top = -INFINITY;
  for (int64_t j = 0; j < cells; j++) {
    double largest = -INFINITY, sum = 0;
    for (int64_t k = 0; k < count; k++) {
      double distance = ((double)centres[j] - components[k].mean) * components[k].inverse;
      double log_term = components[k].log_height - distance * distance;
      if (!isfinite(log_term) && log_term != -INFINITY) largest = NAN;
      largest = log_term > largest ? log_term : largest;
    }
    for (int64_t k = 0; k < count; k++) {
      double distance = ((double)centres[j] - components[k].mean) * components[k].inverse;
      sum += exp(components[k].log_height - distance * distance - largest);
    }
    logs[j] = largest + log(sum) + log_tilt[j];
    if (isnan(logs[j])) top = NAN;
    top = logs[j] > top ? logs[j] : top;
  }
  if (!isfinite(top)) {
    top = -INFINITY;
    for (int64_t j = 0; j < cells; j++) {
      logs[j] = log_marginal[j];
      top = logs[j] > top ? logs[j] : top;
    }
  }
  for (int64_t j = 0; j < cells; j++) mass[j] = (float)exp(logs[j] - top);
}

/* Running sums at the ends of blocks of cells, after a first 0; returns the last one. */
static double write_sums(int64_t cells, const float *mass, double *sums) {
  double total = 0;
  sums[0] = 0;
  for (int64_t start = 0; start < cells; start += BLOCK) {
    int64_t length = cells - start < BLOCK ? cells - start : BLOCK;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < length; j++) sum += mass[start + j];
    total += sum;
    sums[start / BLOCK + 1] = total;
  }
  return total;
}

/* The label below which a share of the masses lies, linear within a cell, raw units. */
static double quantile(float level, int64_t cells, const float *mass, const double *sums, double total,
                       const double *raw_edges) {
  double target = total * level;
  int64_t block = 0, blocks = (cells + BLOCK - 1) / BLOCK;
  while (block < blocks - 1 && sums[block + 1] < target) block++;
  int64_t cell = block * BLOCK, end = cell + BLOCK < cells ? cell + BLOCK : cells;
  double below = sums[block];
  while (cell < end - 1 && below + mass[cell] < target) below += mass[cell++];
  double part = mass[cell] > 0 ? (target - below) / mass[cell] : 0;
  part = part < 0 ? 0 : part > 1 ? 1 : part;
  return raw_edges[cell] + part * (raw_edges[cell + 1] - raw_edges[cell]);
}

/* A row's answer: its point, and with ends of an interval its lower and upper end, which never leave the point out.
 *
 * answers: (1, rows) or (3, rows).
 */
static void write_answer(int64_t rows, int64_t row, double point, const float *ends, int64_t cells, const float *mass,
                         const double *sums, double total, const double *raw_edges, double *answers) {
  answers[row] = point;
  if (!ends) return;
  double lower = quantile(ends[0], cells, mass, sums, total, raw_edges);
  double upper = quantile(ends[1], cells, mass, sums, total, raw_edges);
  answers[rows + row] = lower < point ? lower : point;
  answers[2 * rows + row] = upper > point ? upper : point;
}

/* What a grid tilts densities by: edges (cells + 1), centres, half_widths, log_tilt, log_marginal (cells) of a TiltedGrid. */
typedef struct {
  int64_t cells;
  const float *edges, *centres, *half_widths, *log_tilt, *log_marginal;
} Grid;

/* Masses of the cells by one row's density, and their running sums as `write_sums` has them; returns the last one. */
static double write_masses(const Grid *grid, int64_t count, const float *log_weights, const float *means,
                           const float *scales, float *mass, double *sums) {
  Component components[MOST_COMPONENTS];
  float top = -INFINITY;
  int usable = 1;
  for (int64_t k = 0; k < count; k++) {
    int64_t cell = cell_of(grid->edges, grid->cells, means[k]);
    /* A component narrower than its cell could fall between the middles of cells. */
    float scale = scales[k] < grid->half_widths[cell] ? grid->half_widths[cell] : scales[k];
    components[k] = (Component){log_weights[k] - logf(scale), means[k], SQRT_HALF / scale};
    float height = components[k].log_height + grid->log_tilt[cell];
    top = height > top ? height : top;
    usable &= isfinite(components[k].log_height) && isfinite(means[k]) && isfinite(scale);
  }
  /* What is largest at the means is nearly always largest of all: so nothing over- or underflows. */
  for (int64_t k = 0; k < count; k++) components[k].log_height -= top;
  double total = 0;
  if (usable) {
    memset(mass, 0, (size_t)grid->cells * sizeof *mass);
    for (int64_t k = 0; k < count; k++)
      add_gaussian(grid->cells, components[k].log_height, components[k].mean, components[k].inverse, grid->centres,
                   grid->log_tilt, mass);
    total = write_sums(grid->cells, mass, sums);
  }
  if (total > RELIABLE_TOTAL && total < LARGEST_TOTAL) return total;
  write_careful_masses(components, count, grid->cells, grid->centres, grid->log_tilt, grid->log_marginal, sums, mass);
  return write_sums(grid->cells, mass, sums);
}

/* Masses of the cells by each row's density.
 *
 * log_weights, means, scales: (rows, count) the heads' densities, count at most MOST_COMPONENTS.
 * edges, centres, half_widths, log_tilt, log_marginal: of a Grid.
 * sums: (cells + 2) float64, to work in.
 * masses: (rows, cells)
 */
void tilted_masses(int64_t rows, int64_t count, int64_t cells, const float *log_weights, const float *means,
                   const float *scales, const float *edges, const float *centres, const float *half_widths,
                   const float *log_tilt, const float *log_marginal, double *sums, float *masses) {
  Grid grid = {cells, edges, centres, half_widths, log_tilt, log_marginal};
  for (int64_t row = 0; row < rows; row++) {
    int64_t at = row * count;
    write_masses(&grid, count, log_weights + at, means + at, scales + at, masses + row * cells, sums);
  }
}

/* Points and intervals of rows.
 *
 * log_weights to log_marginal: as in `tilted_masses`.
 * raw_edges: (cells + 1) float64, raw units.
 * offsets: (cells) of the centres from the first raw edge, for means; NULL for medians.
 * ends: the two levels of an interval, or NULL.
 * mass, sums: (cells), (cells + 2) float64, to work in.
 * answers: (1, rows) float64 points; with ends (3, rows): also lower and upper ends.
 */
void tilted_answers(int64_t rows, int64_t count, int64_t cells, const float *log_weights, const float *means,
                    const float *scales, const float *edges, const float *centres, const float *half_widths,
                    const float *log_tilt, const float *log_marginal, const double *raw_edges, const float *offsets,
                    const float *ends, float *mass, double *sums, double *answers) {
  Grid grid = {cells, edges, centres, half_widths, log_tilt, log_marginal};
  for (int64_t row = 0; row < rows; row++) {
    int64_t at = row * count;
    double total = write_masses(&grid, count, log_weights + at, means + at, scales + at, mass, sums), point;
    if (offsets) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < cells; j++) sum += mass[j] * offsets[j];
      point = raw_edges[0] + sum / total;
    } else {
      point = quantile(0.5f, cells, mass, sums, total, raw_edges);
    }
    write_answer(rows, row, point, ends, cells, mass, sums, total, raw_edges, answers);
  }
}

/* The cell that a label lies in, the nearest one for labels beyond the range; raw units. */
static int64_t cell_of_label(const double *raw_edges, int64_t cells, double label) {
  int64_t low = 1, high = cells;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (raw_edges[middle] <= label)
      low = middle + 1;
    else
      high = middle;
  }
  return low - 1;
}

/* Labels scored by the masses of their rows, and two answers of each row: by the masses, and by them times factors.
 *
 * mass: (rows, cells), each row's sum positive.
 * labels: (rows) float64, raw_edges: (cells + 1) float64, raw units.
 * factors: (cells), at most 1.
 * ends: the two levels of an interval.
 * least: what a share of a row's masses counts as where it is less.
 * tilted, sums: (cells), (cells + 2) float64, to work in.
 * found: (6, rows) float64: log of the density at the label, share of the masses below the label, median, lower and
 *   upper end, and the median by the masses times factors, NaN where too little is left of them.
 */
void scored_rows(int64_t rows, int64_t cells, const float *mass, const double *labels, const double *raw_edges,
                 const float *factors, const float *ends, double least, float *tilted, double *sums, double *found) {
  for (int64_t row = 0; row < rows; row++) {
    const float *own = mass + row * cells;
    double total = write_sums(cells, own, sums), label = labels[row];
    int64_t cell = cell_of_label(raw_edges, cells, label);
    double below = sums[cell / BLOCK], width = raw_edges[cell + 1] - raw_edges[cell];
    for (int64_t j = cell / BLOCK * BLOCK; j < cell; j++) below += own[j];
    double part = (label - raw_edges[cell]) / width, share = own[cell] / total, beyond = 0;
    part = part < 0 ? 0 : part > 1 ? 1 : part;
    if (label < raw_edges[0]) beyond = raw_edges[0] - label;
    if (label > raw_edges[cells]) beyond = label - raw_edges[cells];
    double level = (below + part * own[cell]) / total;
    double point = quantile(0.5f, cells, own, sums, total, raw_edges);
    found[row] = log(share > least ? share : least) - log(width + beyond);
    found[rows + row] = level > 1 ? 1 : level;
    write_answer(rows, row, point, ends, cells, own, sums, total, raw_edges, found + 2 * rows);
#pragma omp simd
    for (int64_t j = 0; j < cells; j++) tilted[j] = own[j] * factors[j];
    total = write_sums(cells, tilted, sums);
    found[5 * rows + row] =
        total > RELIABLE_TOTAL ? quantile(0.5f, cells, tilted, sums, total, raw_edges) : NAN;
  }
}
