/* Plain JSON into columns: flat objects whose fields are numbers, booleans and categories, which is what nearly all
 * requests for many predictions are, and nearly all records of a topic. `decoding.py` loads it. Whatever is not plain -
 * or not JSON - is left to the decoder that knows all of it, and that names what is wrong: nothing here explains, it
 * only takes or leaves.
 *
 * Nothing here allocates or keeps state; no byte at or after the end is read.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { NUMERIC = 0, BOOLEAN = 1, CATEGORICAL = 2, LABEL = 3 };

typedef struct {
  const char *at, *end;
} Text;

static inline void skip_space(Text *text) {
  while (text->at < text->end && (*text->at == ' ' || *text->at == '\n' || *text->at == '\t' || *text->at == '\r'))
    text->at++;
}

/* Whether a character comes next, after any space; if so, it is passed. */
static inline int take(Text *text, char character) {
  skip_space(text);
  if (text->at >= text->end || *text->at != character) return 0;
  text->at++;
  return 1;
}

static inline int take_word(Text *text, const char *word, int64_t length) {
  if (text->end - text->at < length || memcmp(text->at, word, (size_t)length) != 0) return 0;
  text->at += length;
  return 1;
}

static inline int is_digit(const Text *text) { return text->at < text->end && *text->at >= '0' && *text->at <= '9'; }

/* 5^0 to 5^27, the last that is below 2^64. */
static const uint64_t POWERS_OF_FIVE[] = {1,
                                          5,
                                          25,
                                          125,
                                          625,
                                          3125,
                                          15625,
                                          78125,
                                          390625,
                                          1953125,
                                          9765625,
                                          48828125,
                                          244140625,
                                          1220703125,
                                          6103515625,
                                          30517578125,
                                          152587890625,
                                          762939453125,
                                          3814697265625,
                                          19073486328125,
                                          95367431640625,
                                          476837158203125,
                                          2384185791015625,
                                          11920928955078125,
                                          59604644775390625,
                                          298023223876953125,
                                          1490116119384765625,
                                          7450580596923828125};
static const double POWERS_OF_TEN[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                       1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
#define LARGEST_EXACT (1ull << 53) /* up to here every integer is a float64 */

/* digits / 10^places, rounded once, to the nearest float64: long division of integers, which leaves what was cut off as
 * the last bit of the quotient. */
static double divided(uint64_t digits, int64_t places) {
  if (digits <= LARGEST_EXACT && places <= 22) return (double)digits / POWERS_OF_TEN[places];
  uint64_t divisor = POWERS_OF_FIVE[places];
  int up = __builtin_clzll(digits), divisor_up = __builtin_clzll(divisor);
  unsigned __int128 dividend = (unsigned __int128)(digits << up) << 63;
  divisor <<= divisor_up;
  uint64_t quotient = (uint64_t)(dividend / divisor); /* 2^62 < quotient < 2^64 */
  quotient |= (uint64_t)(dividend % divisor) != 0;
  return ldexp((double)quotient, (int)(divisor_up - up - 63 - places));
}

/* A number as JSON has it, rounded once to the nearest float64; 0 where that would take more than is done here. */
static int take_number(Text *text, double *value) {
  int negative = text->at < text->end && *text->at == '-';
  text->at += negative;
  if (!is_digit(text)) return 0;
  uint64_t digits = 0;
  int64_t significant = 0, places = 0;
  int whole = 1;
  if (*text->at == '0') {
    text->at++;
    if (is_digit(text)) return 0;
  }
  for (; is_digit(text); text->at++) {
    digits = 10 * digits + (uint64_t)(*text->at - '0');
    if (++significant > 19) return 0;
  }
  if (text->at < text->end && *text->at == '.') {
    text->at++;
    whole = 0;
    if (!is_digit(text)) return 0;
    for (; is_digit(text); text->at++) {
      digits = 10 * digits + (uint64_t)(*text->at - '0');
      significant += digits != 0;
      places++;
      if (significant > 19) return 0;
    }
  }
  if (text->at < text->end && (*text->at == 'e' || *text->at == 'E')) {
    text->at++;
    whole = 0;
    int down = text->at < text->end && *text->at == '-';
    if (down || (text->at < text->end && *text->at == '+')) text->at++;
    if (!is_digit(text)) return 0;
    int64_t exponent = 0;
    for (; is_digit(text); text->at++) {
      exponent = 10 * exponent + (*text->at - '0');
      if (exponent > 999) return 0;
    }
    places += down ? exponent : -exponent;
  }
  double size;
  if (digits == 0)
    size = 0;
  else if (places > 27 || places < -22)
    return 0;
  else if (places > 0)
    size = divided(digits, places);
  else if (places == 0)
    size = (double)digits;
  else if (digits <= LARGEST_EXACT)
    size = (double)digits * POWERS_OF_TEN[-places];
  else
    return 0;
  *value = negative && !(whole && digits == 0) ? -size : size; /* an integer has no -0 */
  return 1;
}

/* A string, its quotes included; of ASCII without escapes where it must be plain. */
static int take_string(Text *text, int plain) {
  if (text->at >= text->end || *text->at != '"') return 0;
  for (text->at++; text->at < text->end; text->at++) {
    unsigned char character = (unsigned char)*text->at;
    if (character == '"') {
      text->at++;
      return 1;
    }
    if (character < 0x20 || (plain && (character >= 0x80 || character == '\\'))) return 0;
    if (character == '\\') text->at++; /* whatever it is, it does not end the string */
  }
  return 0;
}

static int take_scalar(Text *text, int plain) {
  double ignored;
  return take_string(text, plain) || take_word(text, "true", 4) || take_word(text, "false", 5) ||
         take_word(text, "null", 4) || take_number(text, &ignored);
}

/* The fields of a record, in the order of their columns: names one after the other in quotes, where each ends, its kind,
 * and which column of its sort it is. */
typedef struct {
  int64_t count;
  const char *names;
  const int64_t *ends;
  const uint8_t *kinds;
  const int64_t *places;
} Fields;

/* The field whose name is this, quotes included, looked for from `expected` on: records have theirs in one order. */
static int64_t field_of(const Fields *fields, const char *name, int64_t length, int64_t expected) {
  for (int64_t i = 0; i < fields->count; i++) {
    int64_t field = expected + i < fields->count ? expected + i : expected + i - fields->count;
    int64_t start = field ? fields->ends[field - 1] : 0;
    if (fields->ends[field] - start == length && memcmp(fields->names + start, name, (size_t)length) == 0) return field;
  }
  return -1;
}

/* Where a record's values go: see `decode_records` and `decode_values`. */
typedef struct {
  float *numbers;
  int32_t *texts;
  double *label;
} Row;

/* A row in which all is missing. */
static Row empty_row(float *numbers, int64_t width, int32_t *texts, int64_t categories, double *label) {
  for (int64_t j = 0; j < width; j++) numbers[j] = NAN;
  memset(texts, 0, (size_t)(categories * 2) * sizeof *texts);
  if (label) *label = NAN;
  return (Row){numbers, texts, label};
}

static int take_record(Text *text, const Fields *fields, const char *body, Row row) {
  if (!take(text, '{')) return 0;
  if (take(text, '}')) return 1;
  int64_t expected = 0;
  do {
    skip_space(text);
    const char *name = text->at;
    Text again = *text;
    if (!take_string(text, 0)) return 0;
    int64_t field = field_of(fields, name, text->at - name, expected);
    if (field < 0 && !take_string(&again, 1)) return 0; /* which may be a feature in another spelling */
    if (!take(text, ':')) return 0;
    skip_space(text);
    if (field < 0) { /* no feature */
      if (!take_scalar(text, 1)) return 0;
      continue;
    }
    expected = field + 1 < fields->count ? field + 1 : 0;
    int64_t place = fields->places[field];
    if (fields->kinds[field] == CATEGORICAL) {
      int32_t *bounds = row.texts + 2 * place;
      bounds[0] = bounds[1] = 0;
      if (take_word(text, "null", 4)) continue;
      bounds[0] = (int32_t)(text->at - body);
      if (!take_scalar(text, 0)) return 0;
      bounds[1] = (int32_t)(text->at - body);
      continue;
    }
    double value = NAN;
    if (take_word(text, "null", 4))
      ;
    else if (fields->kinds[field] == NUMERIC || fields->kinds[field] == LABEL) {
      if (!take_number(text, &value) || fabs(value) > FLT_MAX) return 0;
    } else if (take_word(text, "true", 4))
      value = 1;
    else if (take_word(text, "false", 5))
      value = 0;
    else
      return 0;
    if (fields->kinds[field] == LABEL)
      *row.label = value;
    else
      row.numbers[place] = (float)value;
  } while (take(text, ','));
  return take(text, '}');
}

/* Records of an array, from `start` of a body on.
 *
 * numbers: (most_rows, width) float32, NaN where missing.
 * texts: (most_rows, categories, 2) int32, from where to where in the body a category stands; nowhere where missing.
 * end: gets where in the body the array ended.
 *
 * Returns how many; -1 where that is for another to say.
 */
int64_t decode_records(const char *body, int64_t length, int64_t start, int64_t most_rows, int64_t count,
                       const char *names, const int64_t *ends, const uint8_t *kinds, const int64_t *places,
                       int64_t width, int64_t categories, float *numbers, int32_t *texts, int64_t *end) {
  Text text = {body + start, body + length};
  Fields fields = {count, names, ends, kinds, places};
  if (length > INT32_MAX || !take(&text, '[')) return -1;
  int64_t rows = 0;
  do {
    if (rows == most_rows) return -1;
    Row row = empty_row(numbers + rows * width, width, texts + rows * categories * 2, categories, NULL);
    if (!take_record(&text, &fields, body, row)) return -1;
    rows++;
  } while (take(&text, ','));
  if (!take(&text, ']')) return -1;
  *end = text.at - body;
  return rows;
}

/* Labelled records, each a value by itself; they stand one after the other in a body.
 *
 * value_ends: (rows,) where in the body each ends.
 * numbers, texts: as in `decode_records`.
 * labels: (rows,) the field of kind LABEL; NaN where it is missing.
 * taken: (rows,) gets 1 where a value is a plain record, and 0 where that is for another to say.
 */
void decode_values(const char *body, int64_t rows, const int64_t *value_ends, int64_t count, const char *names,
                   const int64_t *ends, const uint8_t *kinds, const int64_t *places, int64_t width, int64_t categories,
                   float *numbers, int32_t *texts, double *labels, uint8_t *taken) {
  Fields fields = {count, names, ends, kinds, places};
  for (int64_t i = 0; i < rows; i++) {
    Text text = {body + (i ? value_ends[i - 1] : 0), body + value_ends[i]};
    Row row = empty_row(numbers + i * width, width, texts + i * categories * 2, categories, labels + i);
    taken[i] = value_ends[i] <= INT32_MAX && take_record(&text, &fields, body, row);
    skip_space(&text);
    taken[i] &= text.at == text.end;
  }
}

/* For each text of a column the first row that has the same one, so that each need be looked at once.
 *
 * texts: (rows, categories, 2) as above, of which one column is looked at.
 * slots: (size,) to work with; size is a power of 2 above rows.
 * first: (rows,)
 */
void first_alike(const char *body, int64_t rows, int64_t categories, int64_t column, const int32_t *texts, int64_t size,
                 int32_t *slots, int32_t *first) {
  memset(slots, 0, (size_t)size * sizeof *slots); /* a row counted from 1, or none */
  for (int64_t i = 0; i < rows; i++) {
    const int32_t *bounds = texts + 2 * (i * categories + column);
    int32_t length = bounds[1] - bounds[0];
    uint32_t hash = 2166136261u; /* FNV-1a */
    for (int32_t at = bounds[0]; at < bounds[1]; at++) hash = (hash ^ (uint8_t)body[at]) * 16777619u;
    int64_t slot = hash & (uint64_t)(size - 1);
    for (; slots[slot]; slot = (slot + 1) & (size - 1)) {
      const int32_t *other = texts + 2 * ((slots[slot] - 1) * categories + column);
      if (other[1] - other[0] == length && memcmp(body + other[0], body + bounds[0], (size_t)length) == 0) break;
    }
    if (!slots[slot]) slots[slot] = (int32_t)i + 1;
    first[i] = slots[slot] - 1;
  }
}
