/* Weights as GGUF files store them, to numbers.

Owns the two block formats of the default model; others are read with the `gguf` package. The numbers are those of that
package, bit for bit: the products are exact in float32. */

#ifndef TRANSLOAD_STORED_H
#define TRANSLOAD_STORED_H

#include "tiles.h"

#define BLOCK_NUMBERS GROUP_INPUTS

static float stored_half(const unsigned char *from) { return half_to_float((uint16_t)(from[0] | from[1] << 8)); }

/* Blocks of Q4_1: a scale, a minimum, 32 numbers of 4 bits, low halves first. Or of Q8_0: a scale, 32 signed bytes. */
static void read_stored(int four_bits, const unsigned char *from, int64_t num_blocks, int64_t kind, char *to) {
    float numbers[BLOCK_NUMBERS];
    for (int64_t block = 0; block < num_blocks; block++) {
        const float scale = stored_half(from);
        if (four_bits) {
            const float minimum = stored_half(from + 2);
            for (int i = 0; i < 16; i++) {
                numbers[i] = scale * (from[4 + i] & 15) + minimum;
                numbers[16 + i] = scale * (from[4 + i] >> 4) + minimum;
            }
            from += 20;
        } else {
            for (int i = 0; i < BLOCK_NUMBERS; i++) numbers[i] = scale * (signed char)from[2 + i];
            from += 34;
        }
        for (int i = 0; i < BLOCK_NUMBERS; i += LANES) {
            if (kind == KIND_FLOAT32)
                store((float *)to + block * BLOCK_NUMBERS + i, load(numbers + i));
            else
                store_bf16((uint16_t *)to + block * BLOCK_NUMBERS + i, load(numbers + i));
        }
    }
}

#endif
