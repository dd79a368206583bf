"""The losses of rows against candidates, one Triton kernel each: a CUDA device gets one thing to do, not a hundred.

Formulas as in `trainer.losses.bmc`, `trainer.losses.dense_softmax` and `trainer.losses.density`; no matrix leaves the
registers. A program has a few rows and walks over the candidates, which it masks on its way. `fused` calls these.
"""

import triton
import triton.language as tl


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit(do_not_specialize=["rows", "candidates"])
def balanced_rows(
    pred,  # (B,) float32
    target,  # (B,) float32
    labels,  # (M,) float32
    sigma,  # 0-dim
    out,  # (2, B) float32: loss, its derivative by the prediction
    by_sigma,  # (B,) float64: its derivative by sigma
    spread,  # (B,) float64: the candidates' variance under the softmax
    counts,  # (B,) bool: whether the row counts
    rows,
    candidates,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """Balanced MSE of one-dimensional labels."""
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    there = row < rows
    p = tl.load(pred + row, mask=there, other=0.0)
    own = tl.load(target + row, mask=there, other=0.0)
    keep = _is_finite(p) & _is_finite(own)
    p, own = tl.where(keep, p, 0.0).to(tl.float64), tl.where(keep, own, 0.0).to(tl.float64)

    # The nearest label, by distances in float64: in float32 two of 30 sd round to the same too often. Each lane keeps
    # its own until the end, here and in the sums: what lanes tell each other costs more than what they compute.
    least = tl.full([tile_rows, tile_columns], float("inf"), tl.float64)
    found = tl.zeros([tile_rows, tile_columns], tl.float32)
    for start in range(0, candidates, tile_columns):
        column = start + tl.arange(0, tile_columns)
        y = tl.load(labels + column, mask=column < candidates, other=float("inf"))
        distance = tl.abs(y.to(tl.float64)[None, :] - p[:, None])  # infinite or NaN for no candidate: never nearer
        nearer = distance < least
        least = tl.where(nearer, distance, least)
        found = tl.where(nearer, tl.broadcast_to(y[None, :], [tile_rows, tile_columns]), found)
    nearest = tl.max(tl.where(least == tl.min(least, axis=1)[:, None], found, float("-inf")), axis=1).to(tl.float64)

    exact = nearest - 2 * p
    reference, mirror = nearest.to(tl.float32), exact.to(tl.float32)
    rest = (exact - mirror.to(tl.float64)).to(tl.float32)
    deviation = tl.load(sigma).to(tl.float64)
    variance = deviation * deviation
    power = (-0.5 * 1.4426950408889634 / variance).to(tl.float32)  # of 2
    totals = tl.zeros([tile_rows, tile_columns], tl.float64)
    firsts = tl.zeros([tile_rows, tile_columns], tl.float64)
    seconds = tl.zeros([tile_rows, tile_columns], tl.float64)
    for start in range(0, candidates, tile_columns):
        column = start + tl.arange(0, tile_columns)
        y = tl.load(labels + column, mask=column < candidates, other=float("inf"))
        usable = _is_finite(y)
        y = tl.where(usable, y, 0.0)
        shift = y[None, :] - reference[:, None]
        excess = ((y[None, :] + mirror[:, None]) + rest[:, None]) * shift
        weight = tl.where(usable[None, :], tl.exp2(tl.minimum(excess * power, 0.0)), 0.0)
        totals += weight.to(tl.float64)
        firsts += (weight * shift).to(tl.float64)
        seconds += (weight * excess).to(tl.float64)

    own_shift = own - nearest
    own_excess = ((own + mirror.to(tl.float64)) + rest.to(tl.float64)) * own_shift
    total = tl.where(keep, tl.sum(totals, axis=1), 1.0)  # of a row that counts the own label is a candidate
    mean_shift, mean_excess = tl.sum(firsts, axis=1) / total, tl.sum(seconds, axis=1) / total
    loss = own_excess + 2 * variance * tl.log(total)
    error = mean_shift - own_shift
    slope = 2 * (mean_excess - own_excess) / deviation
    around = mean_excess - (2 * (nearest - p) + mean_shift) * mean_shift
    tl.store(out + row, tl.where(keep, loss, 0.0), mask=there)
    tl.store(out + rows + row, tl.where(keep, 2 * error, 0.0), mask=there)
    tl.store(by_sigma + row, tl.where(keep, slope, 0.0), mask=there)
    tl.store(spread + row, tl.where(keep & (around > 0), around, 0.0), mask=there)
    tl.store(counts + row, keep, mask=there)


@triton.jit(do_not_specialize=["components", "candidates", "first_memory", "rows"])
def mixture_rows(
    log_weights,  # (B, K) float32, and so on
    means,
    log_scales,
    location,  # (B,)
    target,  # (B,)
    labels,  # (M,)
    label_log_weights,  # (M,)
    variances,  # (M - first_memory,) of the last candidates
    scales,  # (B,)
    factors,  # (B,)
    out,  # (2, B): loss, its derivative by the location
    counts,  # (B,) bool: whether the row counts
    by_components,  # (3, B, K): by log weights, means, log scales
    rows,
    components,
    candidates,
    first_memory,
    log_memory_weight,
    location_weight,
    is_likelihood: tl.constexpr,  # without candidates
    has_log_weights: tl.constexpr,
    has_variances: tl.constexpr,
    has_scales: tl.constexpr,
    has_factors: tl.constexpr,
    tile_components: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """Losses of a mixture head, a row a program."""
    row = tl.program_id(0)
    k = tl.arange(0, tile_components)
    real = k < components
    at = row * components + k
    log_pi = tl.load(log_weights + at, mask=real, other=0.0)
    mean = tl.load(means + at, mask=real, other=0.0)
    log_scale = tl.load(log_scales + at, mask=real, other=0.0)
    place, own = tl.load(location + row), tl.load(target + row)
    lost = tl.sum(tl.where(_is_finite(log_pi) & _is_finite(mean) & _is_finite(log_scale), 0, 1))
    keep = (lost == 0) & _is_finite(place) & _is_finite(own)
    log_pi, mean, log_scale = tl.where(keep, log_pi, 0.0), tl.where(keep, mean, 0.0), tl.where(keep, log_scale, 0.0)
    place, own = tl.where(keep, place, 0.0), tl.where(keep, own, 0.0)

    log_pi = tl.where(real, log_pi, float("-inf"))
    precision, base = tl.exp(-2 * log_scale), log_pi - log_scale
    distance = own - mean
    square = distance * distance * precision
    exponent = base - 0.5 * square
    peak = tl.max(exponent)
    share_of_own = tl.exp(exponent - peak)
    total = tl.sum(share_of_own)
    share_of_own = share_of_own / total
    log_own = tl.log(total) + peak

    if has_scales:
        scale = tl.load(scales + row)
    else:
        weight = tl.exp(log_pi)
        gap = mean - tl.sum(weight * mean)
        scale = tl.sqrt(tl.sum(weight * (tl.exp(2 * log_scale) + gap * gap)))
    if has_factors:
        scale *= tl.load(factors + row)

    zeroth = tl.zeros([tile_components], tl.float32)
    first = tl.zeros([tile_components], tl.float32)
    second = tl.zeros([tile_components], tl.float32)
    surprise = 0.9189385332046727 - log_own  # log sqrt(2 pi)
    if not is_likelihood:
        peak = tl.full([], float("-inf"), tl.float32)
        for start in range(0, candidates, tile_columns):
            column = start + tl.arange(0, tile_columns)
            there = column < candidates
            is_memory = column >= first_memory
            y = tl.load(labels + column, mask=there, other=float("inf"))
            usable = _is_finite(y)
            log_weight = tl.where(is_memory, log_memory_weight, 0.0)
            if has_log_weights:
                log_weight += tl.load(label_log_weights + column, mask=there, other=float("-inf"))
                usable = usable & _is_finite(log_weight)
            y, log_weight = tl.where(usable, y, 0.0), tl.where(usable, log_weight, float("-inf"))
            offset = y[None, :] - mean[:, None]
            part = base[:, None] + log_weight[None, :]
            inverse = precision[:, None]
            if has_variances:
                blur = tl.load(variances + (column - first_memory), mask=there & is_memory, other=0.0)
                blur = tl.where(usable, blur, 0.0)
                share = 1 / (1 + blur[None, :] * precision[:, None])  # s^2 / v
                inverse = inverse * share
                part += 0.5 * tl.log(share)
            pull = offset * offset * inverse
            logs = part - 0.5 * pull
            highest = tl.maximum(peak, tl.max(logs))
            safe = tl.where(highest > float("-inf"), highest, 0.0)
            term = tl.exp(logs - safe)
            before = tl.exp(peak - safe)
            peak = highest
            pull = pull - 1
            if has_variances:
                pull = pull * share
            zeroth = zeroth * before + tl.sum(term, axis=1)
            first = first * before + tl.sum(term * offset * inverse, axis=1)
            second = second * before + tl.sum(term * pull, axis=1)
        total = tl.sum(zeroth)
        surprise = tl.log(total) + peak - log_own
        zeroth, first, second = zeroth / total, first / total, second / total

    by_log_pi = scale * (zeroth - share_of_own)
    by_mean = scale * (first - share_of_own * distance * precision)
    by_log_scale = scale * (second - share_of_own * (square - 1))
    tl.store(by_components + at, tl.where(keep, by_log_pi, 0.0), mask=real)
    tl.store(by_components + rows * components + at, tl.where(keep, by_mean, 0.0), mask=real)
    tl.store(by_components + 2 * rows * components + at, tl.where(keep, by_log_scale, 0.0), mask=real)
    error = place - own
    tl.store(out + row, tl.where(keep, scale * surprise + location_weight * error * error, 0.0))
    tl.store(out + rows + row, tl.where(keep, 2 * location_weight * error, 0.0))
    tl.store(counts + row, keep)
