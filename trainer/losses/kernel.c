/* The softmax over candidate labels on a CPU, in one pass over them: what `mixture_softmax`, `density` and
 * `dense_softmax` compute with torch in a dozen passes. `kernel.py` loads it; without it torch does the same.
 *
 * All arrays are contiguous, and float32 where nothing else is said. `hatch_build.py` makes a library of this file for each of several instruction
 * sets; `omp simd` lets the compiler sum in lanes, in an order that is fixed when it compiles. Nothing here allocates,
 * keeps state or looks at the clock.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "../gaussians.h"

#define LN_2 0.693147180559945309
#define LOG_SQRT_2_PI 0.918938533204672742f
#define LOWEST_MIXTURE_POWER (-120.0f) /* terms below 2^-120 of a peak count as that: less would be subnormal, and slow */
#define LOWEST_MIXTURE_SUM 0x1p-50f    /* sums below this may be made of such terms */
#define MOST_COMPONENTS 64
#define BLOCK 256      /* candidates summed in float32 lanes before they join a sum in float64 */
#define SHORT_BLOCK 64 /* the same where the mean is large beside what is left of it once an own label is subtracted */

/* Sums over candidates of what a component's weights e = 2^power, and the derivatives of log e, come to. */
typedef struct {
  double zeroth; /* e */
  double first;  /* e d / v, d = y - mean, v the variance */
  double second; /* e (d^2 / v - 1) s^2 / v, s^2 the component's own part of v */
} Moments;

/* The moments of `count` candidates, where v = s^2 and e = 2^(shift - d^2 log2(e) / 2 v). */
static inline Moments gaussian_sums(const float *labels, int64_t count, float mean, float precision, float shift) {
  Moments sums = {0, 0, 0};
  const float factor = -0.5f * LOG2_E * precision;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const float *block = labels + start;
    int64_t length = count - start < BLOCK ? count - start : BLOCK;
    float zeroth = 0, first = 0, second = 0;
#pragma omp simd reduction(+ : zeroth, first, second)
    for (int64_t j = 0; j < length; j++) {
      float distance = block[j] - mean;
      float power = distance * distance * factor + shift;
      float weight = power_of_two(power < LOWEST_MIXTURE_POWER ? LOWEST_MIXTURE_POWER : power);
      zeroth += weight;
      weight *= distance;
      first += weight;
      second += weight * distance;
    }
    sums.zeroth += zeroth;
    sums.first += first;
    sums.second += second;
  }
  sums.first *= precision;
  sums.second = sums.second * precision - sums.zeroth;
  return sums;
}

/* The same for candidates each of which stands for a Gaussian of labels: v = s^2 + its variance, e as a density's. */
static inline Moments blurred_sums(const float *labels, const float *variances, int64_t count, float mean,
                                   float precision, float shift) {
  Moments sums = {0, 0, 0};
  const float own = 1 / precision;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const float *block = labels + start, *blurs = variances + start;
    int64_t length = count - start < BLOCK ? count - start : BLOCK;
    float zeroth = 0, first = 0, second = 0;
#pragma omp simd reduction(+ : zeroth, first, second)
    for (int64_t j = 0; j < length; j++) {
      float inverse = 1 / (own + blurs[j]), distance = block[j] - mean;
      float share = own * inverse, square = distance * distance * inverse;
      float power = square * (-0.5f * LOG2_E) + shift;
      float weight = power_of_two(power < LOWEST_MIXTURE_POWER ? LOWEST_MIXTURE_POWER : power) * sqrtf(share);
      zeroth += weight;
      first += weight * (distance * inverse);
      second += weight * ((square - 1) * share);
    }
    sums.zeroth += zeroth;
    sums.first += first;
    sums.second += second;
  }
  return sums;
}

/* The least d^2 / v of the candidates; variances may be NULL. */
static inline float least_square(const float *labels, const float *variances, int64_t count, float mean,
                                 float precision) {
  float least = INFINITY, own = 1 / precision;
#pragma omp simd reduction(min : least)
  for (int64_t j = 0; j < count; j++) {
    float distance = labels[j] - mean;
    float square = distance * distance * (variances ? 1 / (own + variances[j]) : precision);
    least = square < least ? square : least;
  }
  return least;
}

/* The moments of a step's labels, and of others after them that count `weight` times and may be blurred. */
static inline Moments weighted_sums(const float *labels, int64_t count, int64_t candidates, const float *variances,
                                    double weight, float mean, float precision, float shift) {
  Moments sums = gaussian_sums(labels, count, mean, precision, shift);
  if (candidates > count) {
    Moments others = variances
                         ? blurred_sums(labels + count, variances, candidates - count, mean, precision, shift)
                         : gaussian_sums(labels + count, candidates - count, mean, precision, shift);
    sums.zeroth += weight * others.zeroth;
    sums.first += weight * others.first;
    sums.second += weight * others.second;
  }
  return sums;
}

/* `density.py`'s losses of rows and their gradients. Without labels the loss is the likelihood.
 *
 * The first `unweighted` candidates count once, the others `other_weight` times, and each of those may stand for a
 * Gaussian of labels with its own of `variances`. variances, scales and weights may be NULL: for labels as they are,
 * the mixture's own standard deviation, and 1. `share` multiplies the gradients: 1 over the rows for those of the mean. Returns 1, or 0 if any number came out not finite; the outputs are
 * then not to be used. */
int mixture_losses(int64_t rows, int64_t components, int64_t candidates, int64_t unweighted, const float *log_weights,
                   const float *means, const float *log_scales, const float *location, const float *target,
                   const float *labels, const float *variances, const float *scales, const float *weights, float other_weight,
                   float location_weight, float share, float *loss, float *mean_loss, float *by_log_weights,
                   float *by_means, float *by_log_scales, float *by_location) {
  double loss_sum = 0;
  float base[MOST_COMPONENTS], precision[MOST_COMPONENTS], own[MOST_COMPONENTS];
  Moments sums[MOST_COMPONENTS];
  int finite = 1;
  for (int64_t i = 0; i < rows; i++) {
    const float *log_weight = log_weights + i * components, *mean = means + i * components;
    const float *log_scale = log_scales + i * components;
    float peak = -INFINITY, own_peak = -INFINITY, mixed = 0;
    for (int64_t k = 0; k < components; k++) {
      float distance = target[i] - mean[k];
      precision[k] = expf(-2 * log_scale[k]);
      base[k] = log_weight[k] - log_scale[k];
      own[k] = base[k] - 0.5f * distance * distance * precision[k];
      peak = base[k] > peak ? base[k] : peak;
      own_peak = own[k] > own_peak ? own[k] : own_peak;
    }
    float own_total = 0;
    for (int64_t k = 0; k < components; k++) {
      own[k] = expf(own[k] - own_peak);
      own_total += own[k];
    }
    float scale;
    if (scales) {
      scale = scales[i];
    } else {
      float weight[MOST_COMPONENTS], variance = 0;
      for (int64_t k = 0; k < components; k++) {
        weight[k] = expf(log_weight[k]);
        mixed += weight[k] * mean[k];
      }
      for (int64_t k = 0; k < components; k++) {
        float gap = mean[k] - mixed;
        variance += weight[k] * (1 / precision[k] + gap * gap);
      }
      scale = sqrtf(variance);
    }
    scale *= weights ? weights[i] : 1.0f;

    double log_sum = LOG_SQRT_2_PI, total = 1;
    for (int64_t k = 0; k < components; k++) sums[k] = (Moments){0, 0, 0};
    if (labels) {
      /* Each component relative to its own peak, which needs no look for the largest exponent. */
      total = 0;
      for (int64_t k = 0; k < components; k++) {
        double height = expf(base[k] - peak);
        sums[k] = weighted_sums(labels, unweighted, candidates, variances, other_weight, mean[k], precision[k], 0);
        sums[k].zeroth *= height, sums[k].first *= height, sums[k].second *= height;
        total += sums[k].zeroth;
      }
      double highest = 0;
      if (!(total > LOWEST_MIXTURE_SUM)) {
        /* All labels are many scales away: the exponents relative to the largest of them. */
        highest = -INFINITY;
        for (int64_t k = 0; k < components; k++) {
          double nearest = least_square(labels, NULL, unweighted, mean[k], precision[k]);
          double other = least_square(labels + unweighted, variances, candidates - unweighted, mean[k], precision[k]);
          double power = LOG2_E * (base[k] - peak - 0.5 * (other < nearest ? other : nearest));
          highest = power > highest ? power : highest;
        }
        total = 0;
        for (int64_t k = 0; k < components; k++) {
          float shift = (float)(LOG2_E * (double)(base[k] - peak) - highest);
          sums[k] = weighted_sums(labels, unweighted, candidates, variances, other_weight, mean[k], precision[k], shift);
          total += sums[k].zeroth;
        }
      }
      log_sum = log(total) + LN_2 * highest + peak;
    }

    float factor = scale * share, row_finite = 0;
    for (int64_t k = 0; k < components; k++) {
      float distance = target[i] - mean[k], own_share = own[k] / own_total;
      float zeroth = (float)(sums[k].zeroth / total) - own_share;
      float first = (float)(sums[k].first / total) - own_share * distance * precision[k];
      float second = (float)(sums[k].second / total) - own_share * (distance * distance * precision[k] - 1);
      by_log_weights[i * components + k] = factor * zeroth;
      by_means[i * components + k] = factor * first;
      by_log_scales[i * components + k] = factor * second;
      row_finite += factor * (zeroth + first + second);
    }
    float error = location[i] - target[i];
    by_location[i] = 2 * location_weight * share * error;
    loss[i] = scale * (float)(log_sum - log(own_total) - own_peak) + location_weight * error * error;
    loss_sum += loss[i];
    finite &= isfinite(row_finite + loss[i] + by_location[i]) != 0;
  }
  *mean_loss = (float)(loss_sum / (double)rows);
  return finite;
}

/* `dense_softmax.py`'s moments of labels in one dimension: log of the sum of exp(-q / 2 v), the means of t and of q.
 *
 * power is -log2(e) / 2 v; mirror + rest is r - 2 p. The results, which others are subtracted from, are float64. */
void shifted_rows(int64_t rows, int64_t candidates, const float *reference, const float *mirror, const float *rest,
                  const float *labels, float power, double *log_sum, double *mean_shift, double *mean_excess) {
  for (int64_t i = 0; i < rows; i++) {
    float r = reference[i], m = mirror[i], s = rest[i];
    double total = 0, shifts = 0, excesses = 0;
    for (int64_t start = 0; start < candidates; start += SHORT_BLOCK) {
      const float *block = labels + start;
      int64_t length = candidates - start < SHORT_BLOCK ? candidates - start : SHORT_BLOCK;
      float zeroth = 0, first = 0, second = 0;
#pragma omp simd reduction(+ : zeroth, first, second)
      for (int64_t j = 0; j < length; j++) {
        float shift = block[j] - r;
        float excess = ((block[j] + m) + s) * shift;
        float exponent = excess * power;
        float weight = power_of_two(exponent < LOWEST_POWER ? LOWEST_POWER : exponent);
        zeroth += weight;
        first += weight * shift;
        second += weight * excess;
      }
      total += zeroth;
      shifts += first;
      excesses += second;
    }
    log_sum[i] = log(total);
    mean_shift[i] = shifts / total;
    mean_excess[i] = excesses / total;
  }
}

/* `mixture.py`'s parts of a mixture from a layer's outputs (3 K + 1 a row), all of them contiguous. */
void mixture_parts(int64_t rows, int64_t components, const float *outputs, float low, float high, float *log_weights,
                   float *means, float *log_scales, float *location) {
  for (int64_t i = 0; i < rows; i++) {
    const float *logits = outputs + i * (3 * components + 1), *offsets = logits + components;
    const float *scales = offsets + components;
    float peak = -INFINITY, total = 0;
    location[i] = scales[components];
    for (int64_t k = 0; k < components; k++) peak = logits[k] > peak ? logits[k] : peak;
    for (int64_t k = 0; k < components; k++) total += expf(logits[k] - peak);
    float log_total = logf(total);
    for (int64_t k = 0; k < components; k++) {
      log_weights[i * components + k] = logits[k] - peak - log_total;
      means[i * components + k] = location[i] + offsets[k];
      log_scales[i * components + k] = scales[k] < low ? low : scales[k] > high ? high : scales[k];
    }
  }
}

/* Gradients by the outputs from those by the parts. */
void mixture_outputs(int64_t rows, int64_t components, const float *outputs, float low, float high,
                     const float *log_weights, const float *by_log_weights, const float *by_means,
                     const float *by_log_scales, const float *by_location, float *by_outputs) {
  for (int64_t i = 0; i < rows; i++) {
    const float *scales = outputs + i * (3 * components + 1) + 2 * components;
    float *by_logits = by_outputs + i * (3 * components + 1), *by_offsets = by_logits + components;
    float *by_scales = by_offsets + components;
    float by_weights = 0, by_all_means = 0;
    for (int64_t k = 0; k < components; k++) {
      by_weights += by_log_weights[i * components + k];
      by_all_means += by_means[i * components + k];
    }
    for (int64_t k = 0; k < components; k++) {
      by_logits[k] = by_log_weights[i * components + k] - expf(log_weights[i * components + k]) * by_weights;
      by_offsets[k] = by_means[i * components + k];
      by_scales[k] = scales[k] >= low && scales[k] <= high ? by_log_scales[i * components + k] : 0;
    }
    by_scales[components] = by_location[i] + by_all_means;
  }
}
