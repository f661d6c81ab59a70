/* λ-returns and GAE on a CPU: each row or packed sequence is walked once, from its end to its start, by one thread.

   Eight tokens go at a time, in a vector. Among them the recurrence Δ_t = δ_t + f Δ_{t+1}, f = λγ, is solved in three
   steps, each adding f, f², f⁴ times the vector shifted by 1, 2, 4; then f⁸ … f times Δ of the token after them, which
   is carried in double precision, so that in float32 the chain from group to group adds next to no rounding of its own.
   A sequence's first n % 8 tokens go one by one, in double precision. Groups are counted from the end of the sequence:
   its bits depend on nothing else, and packed equals padded.

   512 × 1024 float32 are 14.7 MB. One core of a Xeon copies as many in 0.51 ms, and the scan alone takes 0.5, two cores 0.23.

   The compiler reads this file three times: once as it is, and twice as it includes itself, for float and double. */

#ifndef REAL

#include "../cpu.h"

/* Eight consecutive numbers out of x followed by `after`: without the first one, two, four of x. */
#ifdef __clang__
#define SHIFT(x, after, ...) __builtin_shufflevector(x, after, __VA_ARGS__)
#else
#define SHIFT(x, after, ...) __builtin_shuffle(x, after, (INDICES){__VA_ARGS__})
#endif
#define SHIFT_1(x, after) SHIFT(x, after, 1, 2, 3, 4, 5, 6, 7, 8)
#define SHIFT_2(x, after) SHIFT(x, after, 2, 3, 4, 5, 6, 7, 8, 9)
#define SHIFT_4(x, after) SHIFT(x, after, 4, 5, 6, 7, 8, 9, 10, 11)

#define REAL float
#define INTEGER int32_t
#define NAME(function) function##_float32
#include "cpu.c"
#undef REAL
#undef INTEGER
#undef NAME

#define REAL double
#define INTEGER int64_t
#define NAME(function) function##_float64
#include "cpu.c"

#else

#define VECTOR NAME(vector)
#define INDICES NAME(indices)
typedef REAL VECTOR __attribute__((vector_size(8 * sizeof(REAL))));
typedef INTEGER INDICES __attribute__((vector_size(8 * sizeof(REAL))));

INLINE REAL NAME(masked)(REAL x, INTEGER mask)
{
    INTEGER bits;
    memcpy(&bits, &x, sizeof x);
    bits &= mask;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* One sequence of n valid tokens. A result may lie where an argument does, slot for slot: each is read before it is
   written. */
INLINE void NAME(scan)(
    int64_t n,
    const REAL *log_ratio, /* NULL: GAE, where Q = V */
    const REAL *values,
    const REAL *rewards, /* NULL: `score` is paid on the last token */
    REAL score, REAL end_value, double tau, double factor, double gamma, double alpha,
    REAL *returns, REAL *advantages, REAL *action_values, REAL *td_errors)
{
    const VECTOR zero = {0};
    const REAL f1 = factor, f2 = factor * factor, f4 = factor * factor * factor * factor;
    VECTOR carried;                 /* f⁸ … f */
    VECTOR paid = zero;             /* the score, in the last group */
    VECTOR after = zero;            /* V of the eight tokens after */
    double power = 1.0, carry = 0.0; /* f⁸; Δ of the token after */
    for (int i = 7; i >= 0; i--)
        carried[i] = power *= factor;
    paid[7] = rewards ? 0 : score;
    after[0] = end_value;

    int64_t t = n;
    while (t >= 8) {
        t -= 8;
        /* Fetches what comes 256 bytes on, an eighth less time; farther on would cost as much where padding follows.
           Beyond an array's start it does no harm. */
        const REAL *ahead[] = {values, log_ratio ? log_ratio : values, returns, advantages, action_values, td_errors};
        for (int i = 0; i < 6; i++)
            __builtin_prefetch(ahead[i] + t - 64);
        VECTOR V, r = paid, penalty = zero;
        memcpy(&V, values + t, sizeof V);
        if (rewards)
            memcpy(&r, rewards + t, sizeof r);
        if (log_ratio) {
            memcpy(&penalty, log_ratio + t, sizeof penalty);
            penalty *= (REAL)tau;
        }
        /* In this order, because beside values near 10 and τℓ near 0.001, r + γV' − Q would lose the last 13 bits of τℓ. */
        VECTOR delta = (REAL)gamma * SHIFT_1(V, after) - V - penalty + r;
        VECTOR x = delta;
        x += f1 * SHIFT_1(x, zero);
        x += f2 * SHIFT_2(x, zero);
        x += f4 * SHIFT_4(x, zero);
        double first = x[0] + power * carry;
        x += carried * (REAL)carry;
        VECTOR Q = penalty + V, G = (REAL)alpha * x + Q; /* Eqs. 13 and 7 */
        memcpy(returns + t, &G, sizeof G);
        memcpy(advantages + t, &x, sizeof x);
        memcpy(action_values + t, &Q, sizeof Q);
        memcpy(td_errors + t, &delta, sizeof delta);
        carry = first;
        after = V;
        paid = zero;
    }
    double next = after[0], pay = paid[7];
    while (t > 0) {
        t--;
        double penalty = log_ratio ? tau * log_ratio[t] : 0.0, V = values[t], Q = penalty + V;
        double delta = gamma * next - V - penalty + (rewards ? rewards[t] : pay);
        carry = delta + factor * carry;
        returns[t] = alpha * carry + Q;
        advantages[t] = carry;
        action_values[t] = Q;
        td_errors[t] = delta;
        next = V;
        pay = 0.0;
    }
}

/* Sequence s of those below. What lies where the mask is 0 does not count, and becomes 0. */
FOR_EACH_PROCESSOR static void NAME(sequence)(
    int64_t s, const REAL *log_ratio, const REAL *values, const REAL *rewards, const REAL *bootstrap,
    const uint8_t *mask, const int32_t *offsets, int64_t width, int per_token, double tau, double factor, double gamma,
    double alpha, REAL *returns, REAL *advantages, REAL *action_values, REAL *td_errors)
{
    const int64_t start = offsets ? offsets[s] : s * width;
    const int64_t n = offsets ? offsets[s + 1] - start : width;
    const REAL *l = log_ratio ? log_ratio + start : NULL, *V = values + start;
    const REAL *r = per_token ? rewards + start : NULL;
    const REAL score = per_token ? 0 : rewards[s], end_value = bootstrap ? bootstrap[s] : 0;
    REAL *G = returns + start, *D = advantages + start, *Q = action_values + start, *d = td_errors + start;

    /* Is all up to some slot valid, and none after it? If not, the valid tokens are first squeezed together, to
       where the results will be, and these spread afterwards; without branches, which a random mask mispredicts. */
    const uint8_t *valid = mask ? mask + start : NULL;
    const uint8_t *end = valid && n ? memchr(valid, 0, n) : NULL;
    int64_t length = end ? end - valid : n;
    const int holes = end && memcmp(end, end + 1, n - length - 1); /* 0 follows 0 follows 0 … */
    if (holes) {
        length = 0;
        for (int64_t t = 0; t < n; length += valid[t++] != 0) {
            Q[length] = l ? l[t] : 0;
            G[length] = r ? r[t] : 0;
            d[length] = V[t];
        }
        V = d;
        l = l ? Q : NULL;
        r = r ? G : NULL;
    }
    NAME(scan)(length, l, V, r, score, end_value, tau, factor, gamma, alpha, G, D, Q, d);
    if (holes) {
        for (int64_t t = n - 1; t >= 0; t--) {
            const INTEGER kept = -(valid[t] != 0); /* all ones or none */
            length += kept;
            G[t] = NAME(masked)(G[length], kept);
            D[t] = NAME(masked)(D[length], kept);
            Q[t] = NAME(masked)(Q[length], kept);
            d[t] = NAME(masked)(d[length], kept);
        }
    } else {
        const size_t padding = (n - length) * sizeof(REAL);
        memset(G + length, 0, padding);
        memset(D + length, 0, padding);
        memset(Q + length, 0, padding);
        memset(d + length, 0, padding);
    }
}

/* All sequences, N slots together. */
void NAME(lambda_returns)(
    const REAL *log_ratio,  /* (N), or NULL: GAE */
    const REAL *values,     /* (N) */
    const REAL *rewards,    /* (N) if per_token, else (sequences) */
    const REAL *bootstrap,  /* (sequences), or NULL: zeros */
    const uint8_t *mask,    /* (N), or NULL: ones */
    const int32_t *offsets, /* (sequences + 1), or NULL: rows of `width` */
    int64_t sequences, int64_t width, int per_token, double tau, double factor, double gamma, double alpha,
    REAL *returns, REAL *advantages, REAL *action_values, REAL *td_errors, /* (N) each */
    int threads)
{
    const int64_t slots = offsets ? offsets[sequences] : sequences * width;
#pragma omp parallel for num_threads(threads) if (slots > NUMBERS_FOR_THREADS)
    for (int64_t s = sequences - 1; s >= 0; s--) /* downwards in memory throughout, as prefetchers like it */
        NAME(sequence)(s, log_ratio, values, rewards, bootstrap, mask, offsets, width, per_token, tau, factor, gamma,
            alpha, returns, advantages, action_values, td_errors);
}

#undef VECTOR
#undef INDICES
#endif
