/* Decodes mutated records by trainer/decoding.c, each from memory that ends where it ends: ./mutated_records SEED TIMES.
 * To be compiled with -fsanitize=address,undefined, which ends the program at the first wrong access. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int64_t decode_records(const char *body, int64_t length, int64_t start, int64_t most_rows, int64_t count,
                       const char *names, const int64_t *ends, const uint8_t *kinds, const int64_t *places,
                       int64_t width, int64_t categories, float *numbers, int32_t *texts, int64_t *end);

static const char *WHOLE[] = {
    "[{\"x\":1.5e-3,\"on\":true,\"c\":\"U\\u0041\\\"\",\"more\":null},{\"x\":-0.12345678901234567,\"c\":12}]",
    " [ { \"c\" : null , \"on\" : false , \"x\" : 9007199254740993e-27 } , { } ] ",
    "[{\"beside\":\"text\",\"x\":12345678901234567890},{\"x\":1e22,\"c\":\"\xc3\xbc\",\"on\":null}]",
};
static const char PIECES[] = "[]{}:,\"\\0123456789.eE+-tfn \x7f\xff\x01xonc";

static uint64_t state;
static uint64_t drawn(uint64_t below) { /* xorshift64 */
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state % below;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  state = strtoull(argv[1], NULL, 10) * 2654435761u + 1;
  const char names[] = {'"', 'x', '"', '"', 'o', 'n', '"', '"', 'c', '"'};
  const int64_t ends[] = {3, 7, 10}, places[] = {0, 1, 0};
  const uint8_t kinds[] = {0, 1, 2};
  long taken = 0;
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
    free(texts);
    free(numbers);
    free(body);
  }
  printf("%ld\n", taken);
  return 0;
}
