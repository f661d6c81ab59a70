/* log π of each row's token on a CPU, and with it E or the gradient: target_softmax_ of op.py, row by row.

   A row is read for its largest logit, then exponentiated and summed, and scaled where the gradient is wanted; the
   later passes find it in the L2 cache. 342 rows of 50304 logits (66 MiB) take one core of a Xeon 9.5 ms, or 19 without
   AVX2; PyTorch's passes took 25. The loops over the vocabulary have no calls and no branches, so compilers vectorise
   them. */

#include <math.h>

#include "../cpu.h"

/* exp(x) for x ≤ 0, to 1e-7 of itself; 0 below −87, where float32's normal numbers end. NaN stays.
   x = n·log 2 + r with |r| ≤ log 2 / 2; exp(r) = 1 + r + r²·q(r), where q is a polynomial fitted to 2e-8. */
INLINE float exp_of(float x)
{
    const float shift = 12582912.0f; /* 1.5·2²³: adding it rounds to an integer, which lies in the last bits */
    const float shifted = x * 1.44269504f + shift, n = shifted - shift;
    const float r = x - n * 0.693359375f - n * -2.12194440e-4f; /* log 2 in two parts, the first of few bits */
    float q = 0.00138145979f;
    q = q * r + 0.00836871695f;
    q = q * r + 0.0416683881f;
    q = q * r + 0.166665206f;
    q = q * r + 0.499999934f;
    float result = r * r * q + r + 1.0f, power;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000; /* 2ⁿ */
    memcpy(&power, &bits, sizeof bits);
    result *= power;
    memcpy(&bits, &result, sizeof bits);
    bits &= (uint32_t)(x < -87.0f) - 1; /* all ones, or none */
    memcpy(&result, &bits, sizeof bits);
    return result;
}

/* Σ exp((z[j] − top) / temperature) over n logits; the terms are written to e unless it is NULL. 512 numbers at a time
   are summed in float32. */
INLINE double sum_of_exps(int64_t n, const float *z, float top, float inverse_temperature, float *e)
{
    double sum = 0;
    for (int64_t start = 0; start < n; start += 512) {
        const int64_t end = start + 512 < n ? start + 512 : n;
        float part = 0;
        if (e) {
#pragma omp simd reduction(+ : part)
            for (int64_t j = start; j < end; j++)
                part += e[j] = exp_of((z[j] - top) * inverse_temperature);
        } else {
#pragma omp simd reduction(+ : part)
            for (int64_t j = start; j < end; j++)
                part += exp_of((z[j] - top) * inverse_temperature);
        }
        sum += part;
    }
    return sum;
}

FOR_EACH_PROCESSOR static void row_pass(
    int64_t vocab, const float *z, int64_t token, float inverse_temperature, float *out, const float *grad,
    float *logprob, float *total)
{
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < vocab; j++)
        top = z[j] > top ? z[j] : top;

    const double gap = ((double)z[token] - top) * inverse_temperature;
    /* The token's own term never enters the sum of the others: total − own would have lost a small one. */
    const double others = sum_of_exps(token, z, top, inverse_temperature, out) +
        sum_of_exps(vocab - token - 1, z + token + 1, top, inverse_temperature, out ? out + token + 1 : NULL);
    const double all = exp(gap) + others;
    *logprob = gap == 0 ? -log1p(others) : gap - log(all);
    *total = all;
    if (!out)
        return;
    out[token] = -others;
    if (!grad)
        return;
    const float factor = *grad * inverse_temperature / -all;
#pragma omp simd
    for (int64_t j = 0; j < vocab; j++)
        out[j] *= factor;
}

void target_softmax(
    int64_t rows, int64_t vocab,
    const float *logits, const int64_t *starts, /* (rows): where each row starts */
    const int64_t *tokens,                      /* (rows), in [0, vocab) */
    double inverse_temperature,
    float *out, const int64_t *out_starts, /* NULL: nothing; may be logits */
    const float *grad,                     /* (rows): out becomes the gradient; NULL: it becomes E */
    float *logprobs, float *totals,        /* (rows) */
    int threads)
{
#pragma omp parallel for num_threads(threads) if (rows * vocab > NUMBERS_FOR_THREADS)
    for (int64_t i = 0; i < rows; i++)
        row_pass(vocab, logits + starts[i], tokens[i], inverse_temperature, out ? out + out_starts[i] : NULL,
            grad ? grad + i : NULL, logprobs + i, totals + i);
}
