/* Decodes mutated records by trainer/decoding.c, each from memory that ends where it ends: ./mutated_records SEED TIMES.
 * To be compiled with -fsanitize=address,undefined, which ends the program at the first wrong access. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int64_t decode_records(const char *body, int64_t length, int64_t start, int64_t most_rows, int64_t count,
                       const char *names, const int64_t *ends, const uint8_t *kinds, const int64_t *places,
                       int64_t width, int64_t categories, float *numbers, int32_t *texts, int64_t *end);
void decode_values(const char *body, int64_t rows, const int64_t *value_ends, int64_t count, const char *names,
                   const int64_t *ends, const uint8_t *kinds, const int64_t *places, int64_t width, int64_t categories,
                   float *numbers, int32_t *texts, double *labels, uint8_t *taken);
void first_alike(const char *body, int64_t rows, int64_t categories, int64_t column, const int32_t *texts, int64_t size,
                 int32_t *slots, int32_t *first);

static const char *WHOLE[] = {
    "[{\"x\":1.5e-3,\"on\":true,\"c\":\"U\\u0041\\\"\",\"more\":null},{\"x\":-0.12345678901234567,\"c\":12}]",
    " [ { \"c\" : null , \"on\" : false , \"x\" : 9007199254740993e-27 } , { } ] ",
    "[{\"beside\":\"text\",\"x\":12345678901234567890},{\"x\":1e22,\"c\":\"\xc3\xbc\",\"on\":null}]",
};
/* The values of three records, one after the other. */
static const char *VALUES = "{\"x\":1.5,\"c\":\"UA\",\"y\":2}{\"y\":-1e-3,\"c\":\"UA\"} {\"c\":null,\"y\":4,\"on\":true}";
static const char PIECES[] = "[]{}:,\"\\0123456789.eE+-tfn \x7f\xff\x01xonc";

static uint64_t state;
static uint64_t drawn(uint64_t below) { /* xorshift64 */
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state % below;
}

/* Returns how many of three mutated values were taken. */
static long mutated_values(void) {
  const char names[] = "\"x\"\"on\"\"c\"\"y\"";
  const int64_t ends[] = {3, 7, 10, 13}, places[] = {0, 1, 0, 0};
  const uint8_t kinds[] = {0, 1, 2, 3};
  int64_t length = (int64_t)strlen(VALUES), value_ends[] = {24, 44, length};
  char *body = malloc((size_t)length);
  memcpy(body, VALUES, (size_t)length);
  for (uint64_t change = drawn(3); change > 0; change--)
    body[drawn((uint64_t)length)] = PIECES[drawn(sizeof PIECES - 1)];
  if (drawn(3) == 0) {
    value_ends[0] = (int64_t)drawn((uint64_t)length + 1);
    value_ends[1] = value_ends[0] + (int64_t)drawn((uint64_t)(length - value_ends[0]) + 1);
  }
  float *numbers = malloc(6 * sizeof *numbers);
  int32_t *texts = malloc(6 * sizeof *texts), *slots = malloc(4 * sizeof *slots), *first = malloc(3 * sizeof *first);
  double *labels = malloc(3 * sizeof *labels);
  uint8_t *taken = malloc(3);
  decode_values(body, 3, value_ends, 4, names, ends, kinds, places, 2, 1, numbers, texts, labels, taken);
  for (int i = 0; i < 3; i++)
    if (texts[2 * i] < 0 || texts[2 * i + 1] > length || (taken[i] && texts[2 * i] > texts[2 * i + 1])) abort();
  for (int i = 0; i < 3; i++)
    if (!taken[i]) texts[2 * i] = texts[2 * i + 1] = 0;
  first_alike(body, 3, 1, 0, texts, 4, slots, first);
  for (int i = 0; i < 3; i++)
    if (first[i] < 0 || first[i] > i) abort();
  long count = taken[0] + taken[1] + taken[2];
  free(taken);
  free(labels);
  free(first);
  free(slots);
  free(texts);
  free(numbers);
  free(body);
  return count;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  state = strtoull(argv[1], NULL, 10) * 2654435761u + 1;
  const char names[] = {'"', 'x', '"', '"', 'o', 'n', '"', '"', 'c', '"'};
  const int64_t ends[] = {3, 7, 10}, places[] = {0, 1, 0};
  const uint8_t kinds[] = {0, 1, 2};
  long taken = 0, values_taken = 0;
  for (long times = atol(argv[2]); times > 0; times--) {
    const char *whole = WHOLE[drawn(3)];
    int64_t length = (int64_t)strlen(whole);
    if (drawn(3) == 0) length = (int64_t)drawn((uint64_t)length + 1);
    char *body = malloc((size_t)length + (length == 0));
    memcpy(body, whole, (size_t)length);
    for (uint64_t change = drawn(4); length && change > 0; change--)
      body[drawn((uint64_t)length)] = PIECES[drawn(sizeof PIECES - 1)];
    int64_t most = 1 + (int64_t)drawn(3), end = -1;
    float *numbers = malloc((size_t)most * 2 * sizeof *numbers);
    int32_t *texts = malloc((size_t)most * 2 * sizeof *texts);
    int64_t rows = decode_records(body, length, 0, most, 3, names, ends, kinds, places, 2, 1, numbers, texts, &end);
    if (rows > most || (rows >= 0 && (end < 2 || end > length))) abort();
    for (int64_t i = 0; i < rows; i++)
      if (texts[2 * i] < 0 || texts[2 * i] > texts[2 * i + 1] || texts[2 * i + 1] > length) abort();
    taken += rows > 0;
    values_taken += mutated_values();
    free(texts);
    free(numbers);
    free(body);
  }
  printf("%ld %ld\n", taken, values_taken);
  return 0;
}
