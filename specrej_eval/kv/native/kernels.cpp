// Kernels of a decode step on a CPU, compiled on the user's machine by build.py. Plain C++ and OpenMP, no headers of
// torch. Arrays are given by address and strides in elements; the last dimension is contiguous.
//
// What a row gets does not depend on which rows or how many threads are beside it: every sum runs over the same numbers
// in the same order. So products are not contracted into fused multiply-adds unless written so here.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include <omp.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

extern "C" {

// The same fields as build.Attention, in the same order.
struct Attention {
    const void *query;                                     // (rows, kv_heads, groups, width)
    int64_t query_row, query_head, query_group;
    const void *prefix_key, *prefix_value;                 // (kv_heads, prefix, width)
    int64_t prefix_key_head, prefix_key_token, prefix_value_head, prefix_value_token;
    const void *suffix_key, *suffix_value;                 // (rows, kv_heads, suffix, width)
    int64_t suffix_key_row, suffix_key_head, suffix_key_token;
    int64_t suffix_value_row, suffix_value_head, suffix_value_token;
    void *out;                                             // (rows, kv_heads, groups, value width)
    int64_t out_row, out_head, out_group;
    const float *sinks;                                    // (kv_heads * groups,), or null
    void *scratch;                                         // scratch_bytes
    int64_t rows, kv_heads, groups, width, value_width, prefix, suffix;
    int64_t causal_start;                                  // row r sees so many + r + 1 tokens of the prefix; -1: all
    int64_t window;                                        // and of these the last so many; 0: all
    const int64_t *suffix_starts;                          // (rows,); null: each query sees all of the suffix
    int64_t new_tokens;                                    // query g sees suffix_starts[row] + g % new_tokens + 1 of it
    const void *new_key, *new_value;                       // stored as the suffix's last token; null: it is there
    int64_t new_key_row, new_key_head, new_value_row, new_value_head;
    float scale, softcap;                                  // softcap 0: none
    int32_t single;                                        // numbers are float32, else bfloat16
};

// A decode step of several groups of rows, each behind a prefix of its own. The same fields as build.Decode.
struct Decode {
    const Attention **groups;                              // what stays from step to step: prefix, suffix, shapes
    const int64_t *rows, *suffixes;                        // of each group; the new token is the suffix's last
    int64_t count;
    const void *query, *key, *value;                       // (rows of all groups, heads or kv_heads, width)
    int64_t query_row, query_head, key_row, key_head, value_row, value_head;
    void *out;                                             // (rows of all groups, heads, value width)
    int64_t out_row, out_head;
    void *scratch;                                         // decode_bytes
    int64_t window;                                        // a row sees so many tokens; 0: all
    float scale, softcap;
};

// The weight of a linear layer, laid out. The same fields as build.Weights.
struct Weights {
    const void *numbers;                                   // for LANES outputs at a time, `words` vectors of two inputs
    int64_t words, outputs;
};

// A layer of Llama's form, in bfloat16. The same fields as build.Layer.
struct Layer {
    Weights query, key, value, output, gate, up, down;
    const void *query_bias, *key_bias, *value_bias, *output_bias, *gate_bias, *up_bias, *down_bias; // null: none
    const void *before_attention, *before_mlp;             // weights of norms
    const void *of_queries, *of_keys;                      // weights of the norms of each head, or null
    int64_t width;                                         // of a head
    float before_attention_eps, before_mlp_eps, of_queries_eps, of_keys_eps;
    int32_t rotates;                                       // whether there are rotary embeddings
};

} // extern "C"

namespace {

constexpr int LANES = 16;   // numbers of a vector; smaller registers are used in pairs or fours by the compiler
constexpr int BLOCK = 128;  // keys that are scored at a time
constexpr int QUERIES = 48; // queries of one kv head that a thread takes at a time, unless one row has more
constexpr int TILE = 6;     // of which so many share what is read of the keys
constexpr int64_t PACKED = 4 << 20; // bytes of prefixes that are laid out at a time, unless one has more
constexpr int64_t SMALL = 16384; // numbers for which a second thread is not worth waking

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef Floats FloatsAnywhere __attribute__((aligned(4), may_alias));
typedef Words WordsAnywhere __attribute__((aligned(4), may_alias));

inline Floats load(const float *from) { return *reinterpret_cast<const FloatsAnywhere *>(from); }
inline Words load(const uint32_t *from) { return *reinterpret_cast<const WordsAnywhere *>(from); }
inline void store(float *to, Floats x) { *reinterpret_cast<FloatsAnywhere *>(to) = x; }
inline void store(uint32_t *to, Words x) { *reinterpret_cast<WordsAnywhere *>(to) = x; }
inline Floats all(float x) { return Floats{} + x; }
inline Words all(uint32_t x) { return Words{} + x; }

#if defined(__AVX512F__)
inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); } // as a > b ? a : b
#else
inline Floats fused(Floats a, Floats b, Floats c) {
    Floats out;
    for (int i = 0; i < LANES; i++) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return out;
}
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
#endif

// bfloat16 with the rounding of torch (to nearest, ties to even)
inline uint16_t rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}
inline float widened(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// What differs between the two dtypes. A word holds PAIR numbers that are multiplied by PAIR others and added up.
struct Half {
    typedef uint16_t Number;
    static constexpr int PAIR = 2;
    static inline Floats products(Floats sum, uint32_t one, Words many) {
#if defined(__AVX512BF16__)
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(one), (__m512bh)many);
#else
        Floats low = (Floats)(many << 16), high = (Floats)(many & 0xffff0000u);
        return fused(all(widened(one >> 16)), high, fused(all(widened(one & 0xffff)), low, sum));
#endif
    }
    static inline float number(Number x) { return widened(x); }
    static inline Number of(float x) { return rounded(x); }
    static inline void weights(uint32_t *to, Floats first, Floats second) { // 32 weights
#if defined(__AVX512BF16__)
        store(to, (Words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
        uint16_t numbers[2 * LANES]; // not written in place: words are read there, and compilers trust in types
        for (int i = 0; i < LANES; i++) numbers[i] = rounded(first[i]), numbers[LANES + i] = rounded(second[i]);
        std::memcpy(to, numbers, sizeof numbers);
#endif
    }
    // two rows of values -> words of one number of each
    static inline void interleave(const Number *first, const Number *second, uint32_t *to, int count) {
        for (int i = 0; i < count; i++) to[i] = uint32_t(first[i]) | uint32_t(second[i]) << 16;
    }
};

struct Single {
    typedef float Number;
    static constexpr int PAIR = 1;
    static inline Floats products(Floats sum, uint32_t one, Words many) {
        float x;
        std::memcpy(&x, &one, 4);
        return fused(all(x), (Floats)many, sum);
    }
    static inline float number(Number x) { return x; }
    static inline Number of(float x) { return x; }
    static inline void weights(uint32_t *to, Floats first, Floats second) {
        store(reinterpret_cast<float *>(to), first);
        store(reinterpret_cast<float *>(to) + LANES, second);
    }
};

#if defined(__AVX512F__)
// 16 x 16 words, rows of `from` become columns of `to`
inline void transpose(const uint32_t *from, int64_t stride, uint32_t *to, int to_stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + 4 + j], 0x88);
            b[i + 4 + j] = _mm512_shuffle_i32x4(a[i + j], a[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        _mm512_storeu_si512(to + j * to_stride, _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88));
        _mm512_storeu_si512(to + (8 + j) * to_stride, _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd));
    }
}
#else
inline void transpose(const uint32_t *from, int64_t stride, uint32_t *to, int to_stride) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to[j * to_stride + i] = from[i * stride + j];
}
#endif

inline int whole_vectors(int64_t numbers) { return (numbers + LANES - 1) / LANES * LANES; }

// Keys (count, width) -> words (width / PAIR, BLOCK): a vector holds 16 keys' numbers of one place. Zeros behind count.
template <class T>
void pack_keys(const typename T::Number *keys, int64_t stride, int count, int width, uint32_t *to) {
    const int words = width / T::PAIR;
    const uint32_t *from = reinterpret_cast<const uint32_t *>(keys);
    const int64_t word_stride = stride / T::PAIR;
    int first = 0;
    for (; first + LANES <= count; first += LANES) {
        int at = 0;
        for (; at + LANES <= words; at += LANES)
            transpose(from + first * word_stride + at, word_stride, to + at * BLOCK + first, BLOCK);
        for (; at < words; at++)
            for (int i = 0; i < LANES; i++) to[at * BLOCK + first + i] = from[(first + i) * word_stride + at];
    }
    const int end = (count + LANES - 1) / LANES * LANES;
    for (; first < end; first++)
        for (int at = 0; at < words; at++)
            to[at * BLOCK + first] = first < count ? from[first * word_stride + at] : 0;
}

// Values (count, width) -> words (BLOCK / PAIR, whole vectors): a word holds one place's numbers of PAIR tokens.
template <class T>
void pack_values(const typename T::Number *values, int64_t stride, int count, int width, uint32_t *to) {
    const int end = (count + LANES - 1) / LANES * LANES, padded = whole_vectors(width);
    for (int token = 0; token < end; token += T::PAIR, to += padded) {
        for (int i = width; i < padded; i++) to[i] = 0;
        if constexpr (T::PAIR == 1) {
            if (token < count) std::memcpy(to, values + token * stride, 4 * width);
            else std::memset(to, 0, 4 * width);
        } else {
            const typename T::Number *one = values + token * stride;
            if (token + 1 < count) T::interleave(one, one + stride, to, width);
            else for (int i = 0; i < width; i++) to[i] = token < count ? uint32_t(one[i]) : 0;
        }
    }
}

template <class T, int ROWS, int VECTORS>
inline void score_tile(const uint32_t *queries, int words, const uint32_t *keys, float *to) {
    Floats sums[ROWS][VECTORS] = {};
    for (int at = 0; at < words; at++) {
        Words many[VECTORS];
        for (int v = 0; v < VECTORS; v++) many[v] = load(keys + at * BLOCK + v * LANES);
        for (int row = 0; row < ROWS; row++)
            for (int v = 0; v < VECTORS; v++)
                sums[row][v] = T::products(sums[row][v], queries[row * words + at], many[v]);
    }
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < VECTORS; v++) store(to + row * BLOCK + v * LANES, sums[row][v]);
}

template <class T, int ROWS>
inline void score_rows(const uint32_t *queries, int words, const uint32_t *keys, int vectors, float *to) {
    int v = 0;
    for (; v + 4 <= vectors; v += 4) score_tile<T, ROWS, 4>(queries, words, keys + v * LANES, to + v * LANES);
    if (vectors - v >= 2) { score_tile<T, ROWS, 2>(queries, words, keys + v * LANES, to + v * LANES); v += 2; }
    if (vectors - v >= 1) score_tile<T, ROWS, 1>(queries, words, keys + v * LANES, to + v * LANES);
}

template <class T, int ROWS, int VECTORS>
inline void add_tile(const uint32_t *weights, int words, const uint32_t *values, int width, float *to) {
    Floats sums[ROWS][VECTORS];
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < VECTORS; v++) sums[row][v] = load(to + row * width + v * LANES);
    for (int at = 0; at < words; at++) {
        Words many[VECTORS];
        for (int v = 0; v < VECTORS; v++) many[v] = load(values + at * width + v * LANES);
        for (int row = 0; row < ROWS; row++)
            for (int v = 0; v < VECTORS; v++)
                sums[row][v] = T::products(sums[row][v], weights[row * (BLOCK / T::PAIR) + at], many[v]);
    }
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < VECTORS; v++) store(to + row * width + v * LANES, sums[row][v]);
}

template <class T, int ROWS>
inline void add_rows(const uint32_t *weights, int words, const uint32_t *values, int width, float *to) {
    int v = 0;
    for (; v + 4 * LANES <= width; v += 4 * LANES) add_tile<T, ROWS, 4>(weights, words, values + v, width, to + v);
    for (; v < width; v += LANES) add_tile<T, ROWS, 1>(weights, words, values + v, width, to + v);
}

// 2 ** x for x <= 0; relative error below 3e-7, and 0 where x is below -126. NaN stays NaN.
inline Floats power_of_two(Floats x) {
    const Floats low = all(-127.0f);
    x = larger(low, x); // the second of the two if either is NaN
    const Floats magic = all(12582912.0f); // 1.5 * 2 ** 23: adding it rounds to an integer
    const Floats whole = x + magic;
    const Floats part = x - (whole - magic); // in [-0.5, 0.5]
    Floats sum = all(1.5403530e-4f);
    sum = fused(sum, part, all(1.3333558e-3f));
    sum = fused(sum, part, all(9.6181291e-3f));
    sum = fused(sum, part, all(5.5504109e-2f));
    sum = fused(sum, part, all(2.4022651e-1f));
    sum = fused(sum, part, all(6.9314718e-1f));
    sum = fused(sum, part, all(1.0f));
    const Ints exponent = ((Ints)whole - (Ints)magic + 127) << 23; // 0 at -127: then the product is 0
    return sum * (Floats)exponent;
}

inline float sum_of(Floats x) {
    float numbers[LANES];
    store(numbers, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) numbers[i] += numbers[i + half];
    return numbers[0];
}
inline float largest_of(Floats x) {
    float numbers[LANES];
    store(numbers, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) numbers[i] = numbers[i] > numbers[i + half] ? numbers[i] : numbers[i + half];
    return numbers[0];
}

// A thread's place to work in.
struct Work {
    uint32_t *queries;         // (queries, words)
    float *scores;             // (queries, BLOCK)
    uint32_t *weights;         // (queries, BLOCK / PAIR)
    float *sums;               // (queries, value width)
    float *most, *mass;        // (queries,): the largest score so far, and the sum of weights relative to it
    int *first_seen, *end_seen; // (queries,): which keys of a block each query sees
    uint32_t *keys, *values;   // a row's own, packed
};

inline int64_t queries_at_once(int64_t groups) { return groups > QUERIES ? groups : QUERIES / groups * groups; }

int64_t work_bytes(int64_t queries, int pair, int width, int value_width) {
    const int64_t bytes = 4 * (queries * (width / pair) + queries * BLOCK + queries * (BLOCK / pair) +
                               queries * value_width + 4 * queries + BLOCK * (width / pair) + BLOCK / pair * value_width);
    return (bytes + 64 * 10 + 63) / 64 * 64; // each array begins on a cache line
}

Work work_at(char *from, int64_t queries, int pair, int width, int value_width) {
    auto take = [&from](int64_t words) {
        char *here = from;
        from += (4 * words + 63) / 64 * 64;
        return here;
    };
    Work work;
    work.queries = (uint32_t *)take(queries * (width / pair));
    work.scores = (float *)take(queries * BLOCK);
    work.weights = (uint32_t *)take(queries * (BLOCK / pair));
    work.sums = (float *)take(queries * value_width);
    work.most = (float *)take(queries);
    work.mass = (float *)take(queries);
    work.first_seen = (int *)take(queries);
    work.end_seen = (int *)take(queries);
    work.keys = (uint32_t *)take(BLOCK * (width / pair));
    work.values = (uint32_t *)take(BLOCK / pair * value_width);
    return work;
}

// Squashes scores, in place, to within plus and minus `cap`: cap * tanh(score * scale / cap), in powers of two.
inline void squash(float *scores, int vectors, float scale, float cap) {
    const Floats factor = all(scale / cap * 2.88539008177793f), most = all(cap * 1.44269504088896f);
    for (int v = 0; v < vectors; v++) {
        const Floats x = load(scores + v * LANES) * factor;
        const Floats e = power_of_two(x < 0.0f ? x : -x); // exp(-2 |y|)
        const Floats squashed = most * ((1.0f - e) / (1.0f + e));
        store(scores + v * LANES, x < 0.0f ? -squashed : squashed);
    }
}

// Queries [first, first + count) of the work take in one block of keys.
// cut: each sees only its keys [first_seen, end_seen).
template <class T>
void take_in(Work &work, int first, int count, const uint32_t *keys, const uint32_t *values, int count_keys, int width,
             int value_width, const Attention &a, bool cut) {
    // powers of two are computed; a squashed score is scaled already
    const float scale = a.softcap > 0 ? 1.0f : a.scale * 1.44269504088896f;
    const int words = width / T::PAIR;
    const int vectors = (count_keys + LANES - 1) / LANES;
    for (int q = first; q < first + count; q += TILE) {
        const uint32_t *queries = work.queries + q * words;
        float *to = work.scores + q * BLOCK;
        switch (first + count - q < TILE ? first + count - q : TILE) {
            case 1: score_rows<T, 1>(queries, words, keys, vectors, to); break;
            case 2: score_rows<T, 2>(queries, words, keys, vectors, to); break;
            case 3: score_rows<T, 3>(queries, words, keys, vectors, to); break;
            case 4: score_rows<T, 4>(queries, words, keys, vectors, to); break;
            case 5: score_rows<T, 5>(queries, words, keys, vectors, to); break;
            default: score_rows<T, 6>(queries, words, keys, vectors, to);
        }
    }
    const float lowest = -std::numeric_limits<float>::infinity();
    for (int q = first; q < first + count; q++) {
        float *scores = work.scores + q * BLOCK;
        if (a.softcap > 0) squash(scores, vectors, a.scale, a.softcap);
        const int padded = (vectors + 1) / 2 * 2 * LANES;
        for (int i = cut ? work.end_seen[q] : count_keys; i < padded; i++) scores[i] = lowest;
        for (int i = 0; cut && i < work.first_seen[q]; i++) scores[i] = lowest;
        Floats most = load(scores);
        for (int v = 1; v < vectors; v++) most = larger(most, load(scores + v * LANES));
        const float before = work.most[q];
        float now = largest_of(most) * scale; // scale > 0
        now = before > now ? before : now; // a NaN comes through, and makes the row NaN, as it must
        uint32_t *weights = work.weights + q * (BLOCK / T::PAIR);
        if (now == lowest) { // it has seen nothing yet
            std::memset(weights, 0, 4 * (padded / T::PAIR));
            continue;
        }
        if (now != before) {
            const float less = before == lowest ? 0.0f : power_of_two(all(before - now))[0];
            float *sums = work.sums + q * value_width;
            for (int i = 0; i < value_width; i += LANES) store(sums + i, load(sums + i) * less);
            work.mass[q] *= less;
            work.most[q] = now;
        }
        Floats mass = {};
        const Floats factor = all(scale), minus = all(-now);
        for (int v = 0; v < vectors; v += 2) {
            Floats one = power_of_two(fused(load(scores + v * LANES), factor, minus));
            Floats two = power_of_two(fused(load(scores + (v + 1) * LANES), factor, minus));
            mass += one;
            mass += two;
            T::weights(weights + v * LANES / T::PAIR, one, two);
        }
        work.mass[q] += sum_of(mass);
    }
    const int weight_words = vectors * LANES / T::PAIR;
    for (int q = first; q < first + count; q += TILE) {
        const uint32_t *weights = work.weights + q * (BLOCK / T::PAIR);
        float *to = work.sums + q * value_width;
        switch (first + count - q < TILE ? first + count - q : TILE) {
            case 1: add_rows<T, 1>(weights, weight_words, values, value_width, to); break;
            case 2: add_rows<T, 2>(weights, weight_words, values, value_width, to); break;
            case 3: add_rows<T, 3>(weights, weight_words, values, value_width, to); break;
            case 4: add_rows<T, 4>(weights, weight_words, values, value_width, to); break;
            case 5: add_rows<T, 5>(weights, weight_words, values, value_width, to); break;
            default: add_rows<T, 6>(weights, weight_words, values, value_width, to);
        }
    }
}

// What a thread does of one request: some rows of one kv head.
template <class T>
void attend_rows(const Attention &a, Work &work, int64_t head, int64_t first_row, int rows, const uint32_t *packed_keys,
                 const uint32_t *packed_values) {
    typedef typename T::Number Number;
    constexpr float LOG2E = 1.44269504088896f;
    const int width = a.width, value_width = whole_vectors(a.value_width), groups = a.groups, words = width / T::PAIR;
    const int64_t blocks = (a.prefix + BLOCK - 1) / BLOCK;
    const int64_t key_words = int64_t(words) * BLOCK, value_words = int64_t(BLOCK / T::PAIR) * value_width;
    const int count = rows * groups;
    for (int row = 0; row < rows; row++)
        for (int group = 0; group < groups; group++) {
            const int q = row * groups + group;
            const Number *query = (const Number *)a.query + (first_row + row) * a.query_row + head * a.query_head +
                                  group * a.query_group;
            std::memcpy(work.queries + q * words, query, 4 * words);
            work.most[q] = a.sinks ? a.sinks[head * groups + group] * LOG2E : -std::numeric_limits<float>::infinity();
            work.mass[q] = a.sinks ? 1.0f : 0.0f;
        }
    std::memset(work.sums, 0, 4ll * count * value_width);
    const bool causal = a.causal_start >= 0;
    const int64_t nearest = a.causal_start + first_row + 1, furthest = nearest + rows - 1; // tokens seen
    const int64_t oldest = causal && a.window ? nearest - a.window : 0;
    for (int64_t block = 0; block < blocks && (!causal || block * BLOCK < furthest); block++) {
        const int64_t first = block * BLOCK;
        const int keys = a.prefix - first < BLOCK ? a.prefix - first : BLOCK;
        if (first + keys <= oldest) continue;
        const bool cut = causal && (nearest < first + keys || (a.window && furthest - a.window > first));
        for (int q = 0; cut && q < count; q++) {
            const int64_t end = nearest + q / groups - first, start = a.window ? end - a.window : 0;
            work.end_seen[q] = end < 0 ? 0 : end < keys ? end : keys;
            work.first_seen[q] = start < 0 ? 0 : start < keys ? start : keys;
        }
        take_in<T>(work, 0, count, packed_keys + (head * blocks + block) * key_words,
                   packed_values + (head * blocks + block) * value_words, keys, width, value_width, a, cut);
    }
    for (int row = 0; row < rows; row++) {
        const int64_t r = first_row + row;
        Number *own_keys = (Number *)a.suffix_key + r * a.suffix_key_row + head * a.suffix_key_head;
        Number *own_values = (Number *)a.suffix_value + r * a.suffix_value_row + head * a.suffix_value_head;
        if (a.new_key) {
            std::memcpy(own_keys + (a.suffix - 1) * a.suffix_key_token,
                        (const Number *)a.new_key + r * a.new_key_row + head * a.new_key_head, sizeof(Number) * width);
            std::memcpy(own_values + (a.suffix - 1) * a.suffix_value_token,
                        (const Number *)a.new_value + r * a.new_value_row + head * a.new_value_head,
                        sizeof(Number) * a.value_width);
        }
        for (int64_t first = 0; first < a.suffix; first += BLOCK) {
            const int keys = a.suffix - first < BLOCK ? a.suffix - first : BLOCK;
            pack_keys<T>(own_keys + first * a.suffix_key_token, a.suffix_key_token, keys, width, work.keys);
            pack_values<T>(own_values + first * a.suffix_value_token, a.suffix_value_token, keys, a.value_width,
                           work.values);
            for (int group = 0; a.suffix_starts && group < groups; group++) {
                const int64_t end = a.suffix_starts[r] + group % a.new_tokens + 1 - first;
                work.end_seen[row * groups + group] = end < 0 ? 0 : end < keys ? end : keys;
                work.first_seen[row * groups + group] = 0;
            }
            take_in<T>(work, row * groups, groups, work.keys, work.values, keys, width, value_width, a,
                       a.suffix_starts != nullptr);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int group = 0; group < groups; group++) {
            const int q = row * groups + group;
            const float share = 1.0f / work.mass[q];
            const float *sums = work.sums + q * value_width;
            Number *out = (Number *)a.out + (first_row + row) * a.out_row + head * a.out_head + group * a.out_group;
            for (int i = 0; i < a.value_width; i++) out[i] = T::of(sums[i] * share);
        }
}

inline int pair_of(const Attention &a) { return a.single ? 1 : 2; }

// What the prefix of a request takes, laid out.
int64_t packed_bytes(const Attention &a) {
    return 4 * a.kv_heads * ((a.prefix + BLOCK - 1) / BLOCK) * BLOCK / pair_of(a) *
           (a.width + whole_vectors(a.value_width));
}

int64_t all_work_bytes(const Attention &a) {
    return omp_get_max_threads() *
           work_bytes(queries_at_once(a.groups), pair_of(a), a.width, whole_vectors(a.value_width));
}

// Where the parts of a request are among those of all, and where its prefix is laid out.
struct Place {
    int64_t first_pack, first_task, blocks, parts;
    uint32_t *keys, *values;
};

// `count` requests of one layer, which differ in their rows, prefixes and suffixes only.
template <class T> void attend(const Attention *all, int64_t count, void *scratch) {
    typedef typename T::Number Number;
    const int width = all->width, value_width = whole_vectors(all->value_width);
    const int64_t key_words = int64_t(width / T::PAIR) * BLOCK, value_words = int64_t(BLOCK / T::PAIR) * value_width;
    const int64_t queries = queries_at_once(all->groups), rows_at_once = queries / all->groups;
    const int64_t each = work_bytes(queries, T::PAIR, width, value_width);
    uint32_t *next = (uint32_t *)((uintptr_t(scratch) + 63) / 64 * 64);
    std::vector<Place> places(count);
    int64_t packs = 0, tasks = 0;
    for (int64_t i = 0; i < count; i++) {
        const Attention &a = all[i];
        const int64_t blocks = (a.prefix + BLOCK - 1) / BLOCK, parts = (a.rows + rows_at_once - 1) / rows_at_once;
        uint32_t *values = next + a.kv_heads * blocks * key_words;
        places[i] = {packs, tasks, blocks, parts, next, values};
        next = values + a.kv_heads * blocks * value_words;
        packs += a.kv_heads * blocks;
        tasks += a.kv_heads * parts;
    }
    char *works = (char *)next;
    auto after_pack = [](int64_t pack, const Place &place) { return pack < place.first_pack; };
    auto after_task = [](int64_t task, const Place &place) { return task < place.first_task; };
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t pack = 0; pack < packs; pack++) {
            const Place &place = *(std::upper_bound(places.begin(), places.end(), pack, after_pack) - 1);
            const Attention &a = all[&place - places.data()];
            const int64_t mine = pack - place.first_pack, head = mine / place.blocks;
            const int64_t first = mine % place.blocks * BLOCK;
            const int keys = a.prefix - first < BLOCK ? a.prefix - first : BLOCK;
            pack_keys<T>((const Number *)a.prefix_key + head * a.prefix_key_head + first * a.prefix_key_token,
                         a.prefix_key_token, keys, width, place.keys + mine * key_words);
            pack_values<T>((const Number *)a.prefix_value + head * a.prefix_value_head + first * a.prefix_value_token,
                           a.prefix_value_token, keys, a.value_width, place.values + mine * value_words);
        }
        Work work = work_at(works + omp_get_thread_num() * each, queries, T::PAIR, width, value_width);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const Place &place = *(std::upper_bound(places.begin(), places.end(), task, after_task) - 1);
            const Attention &a = all[&place - places.data()];
            const int64_t mine = task - place.first_task, first_row = mine % place.parts * rows_at_once;
            const int rows = a.rows - first_row < rows_at_once ? a.rows - first_row : rows_at_once;
            attend_rows<T>(a, work, mine / place.parts, first_row, rows, place.keys, place.values);
        }
    }
}

// A decode step as one request for each group, behind what a window hides.
std::vector<Attention> requests(const Decode &d) {
    std::vector<Attention> all;
    all.reserve(d.count);
    int64_t row = 0;
    for (int64_t i = 0; i < d.count; i++) {
        Attention a = *d.groups[i];
        const int64_t bytes = a.single ? 4 : 2;
        auto at = [bytes](const void *from, int64_t numbers) { return (const char *)from + bytes * numbers; };
        a.query = at(d.query, row * d.query_row);
        a.query_row = d.query_row, a.query_head = a.groups * d.query_head, a.query_group = d.query_head;
        a.new_key = at(d.key, row * d.key_row), a.new_key_row = d.key_row, a.new_key_head = d.key_head;
        a.new_value = at(d.value, row * d.value_row), a.new_value_row = d.value_row, a.new_value_head = d.value_head;
        a.out = (void *)at(d.out, row * d.out_row);
        a.out_row = d.out_row, a.out_head = a.groups * d.out_head, a.out_group = d.out_head;
        a.rows = d.rows[i], a.suffix = d.suffixes[i], a.scale = d.scale, a.softcap = d.softcap;
        const int64_t hidden = d.window && a.prefix + a.suffix > d.window ? a.prefix + a.suffix - d.window : 0;
        const int64_t of_prefix = hidden < a.prefix ? hidden : a.prefix, of_suffix = hidden - of_prefix;
        a.prefix_key = at(a.prefix_key, of_prefix * a.prefix_key_token);
        a.prefix_value = at(a.prefix_value, of_prefix * a.prefix_value_token);
        a.prefix -= of_prefix;
        a.suffix_key = at(a.suffix_key, of_suffix * a.suffix_key_token);
        a.suffix_value = at(a.suffix_value, of_suffix * a.suffix_value_token);
        a.suffix -= of_suffix;
        all.push_back(a);
        row += a.rows;
    }
    return all;
}

// Requests [first, ...) that are taken at a time: as many as have their prefixes in a cache, laid out; one at least.
size_t end_of_turn(const std::vector<Attention> &all, size_t first) {
    int64_t bytes = packed_bytes(all[first]);
    size_t end = first + 1;
    while (end < all.size() && (bytes += packed_bytes(all[end])) <= PACKED) end++;
    return end;
}

// Elementwise parts of a layer. Numbers are rounded to their dtype where the model's own operators round them.
template <class T> inline Floats wide(const typename T::Number *from) {
    if constexpr (T::PAIR == 1) return load(from);
    else {
#if defined(__AVX512F__)
        return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#else
        Words words;
        for (int i = 0; i < LANES; i++) words[i] = uint32_t(from[i]) << 16;
        return (Floats)words;
#endif
    }
}
template <class T> inline Floats round_to(Floats x) {
    if constexpr (T::PAIR == 1) return x;
    else {
        const Words bits = (Words)x;
        const Words even = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
        return (Floats)((bits & 0x7fffffffu) > 0x7f800000u ? all(0x7fc00000u) : even);
    }
}
template <class T> inline void narrow(typename T::Number *to, Floats x) { // x is rounded
    if constexpr (T::PAIR == 1) store(to, x);
    else {
#if defined(__AVX512F__)
        _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x, 16)));
#else
        for (int i = 0; i < LANES; i++) to[i] = ((Words)x)[i] >> 16;
#endif
    }
}

// weight * round(x / sqrt(mean(x ** 2) + eps)): LlamaRMSNorm of transformers. (rows, width), contiguous.
template <class T>
void norm_rows(const typename T::Number *x, const typename T::Number *weight, typename T::Number *out, int64_t rows,
               int64_t width, float eps) {
    typedef typename T::Number Number;
    const int64_t whole = width / LANES * LANES;
#pragma omp parallel for schedule(static) if (rows * width > SMALL)
    for (int64_t row = 0; row < rows; row++) {
        const Number *from = x + row * width;
        Number *to = out + row * width;
        Floats squares = {}, more = {};
        int64_t i = 0;
        for (; i + 2 * LANES <= whole; i += 2 * LANES) {
            const Floats one = wide<T>(from + i), two = wide<T>(from + i + LANES);
            squares = fused(one, one, squares);
            more = fused(two, two, more);
        }
        for (; i < whole; i += LANES) squares = fused(wide<T>(from + i), wide<T>(from + i), squares);
        float sum = sum_of(squares + more);
        for (; i < width; i++) sum += T::number(from[i]) * T::number(from[i]);
        const float factor = 1.0f / std::sqrt(sum / width + eps);
        for (i = 0; i < whole; i += LANES)
            narrow<T>(to + i, round_to<T>(wide<T>(weight + i) * round_to<T>(wide<T>(from + i) * factor)));
        for (; i < width; i++) to[i] = T::of(T::number(weight[i]) * T::number(T::of(T::number(from[i]) * factor)));
    }
}

// round(silu(gate)) * up
template <class T>
void gate_all(const typename T::Number *gate, const typename T::Number *up, typename T::Number *out, int64_t count) {
    const int64_t vectors = count / LANES;
    auto silu = [](Floats x) {
        const Floats y = x * 1.44269504088896f;
        const Floats e = power_of_two(y < 0.0f ? y : -y); // exp(-|x|)
        return x / (1.0f + e) * (x < 0.0f ? e : all(1.0f));
    };
#pragma omp parallel for schedule(static) if (count > SMALL)
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t i = v * LANES;
        narrow<T>(out + i, round_to<T>(round_to<T>(silu(wide<T>(gate + i))) * wide<T>(up + i)));
    }
    for (int64_t i = vectors * LANES; i < count; i++)
        out[i] = T::of(T::number(T::of(silu(all(T::number(gate[i])))[0])) * T::number(up[i]));
}

// round(round(x * cos) + round(rotate_half(x) * sin)), of queries or keys
template <class T>
void rotate_heads(const typename T::Number *x, const int64_t *x_strides, typename T::Number *out,
                  const int64_t *out_strides, const typename T::Number *cos, const typename T::Number *sin,
                  int64_t table_batch, int64_t batch, int64_t heads, int64_t tokens, int64_t width) {
    typedef typename T::Number Number;
    const int64_t half = width / 2;
#pragma omp parallel for collapse(2) schedule(static) if (batch * heads * tokens * width > SMALL)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t token = 0; token < tokens; token++) {
            const Number *c = cos + b * table_batch + token * width, *s = sin + b * table_batch + token * width;
            for (int64_t head = 0; head < heads; head++) {
                const Number *from = x + b * x_strides[0] + head * x_strides[1] + token * x_strides[2];
                Number *to = out + b * out_strides[0] + head * out_strides[1] + token * out_strides[2];
                int64_t i = 0;
                for (; i + LANES <= half; i += LANES) {
                    const Floats low = wide<T>(from + i), high = wide<T>(from + half + i);
                    narrow<T>(to + i, round_to<T>(round_to<T>(low * wide<T>(c + i)) +
                                                  round_to<T>(-high * wide<T>(s + i))));
                    narrow<T>(to + half + i, round_to<T>(round_to<T>(high * wide<T>(c + half + i)) +
                                                         round_to<T>(low * wide<T>(s + half + i))));
                }
                for (; i < half; i++) {
                    const float low = T::number(from[i]), high = T::number(from[half + i]);
                    auto mixed = [](float a, float b) { return T::of(T::number(T::of(a)) + T::number(T::of(b))); };
                    to[i] = mixed(low * T::number(c[i]), -high * T::number(s[i]));
                    to[half + i] = mixed(high * T::number(c[half + i]), low * T::number(s[half + i]));
                }
            }
        }
}

// Logits: what a token is drawn from. (rows, count) float32, rows `stride` apart.

// Places of the `width` largest numbers of a row, in no order. The row is cut into pieces; the width-th largest of their
// largest numbers is exceeded or equalled by `width` numbers at least, so nothing below it is looked at.
void largest_of_row(const float *numbers, int64_t count, int64_t width, int64_t *places) {
    constexpr int64_t PIECE = 4 * LANES;
    const int64_t pieces = count / PIECE;
    float least = -std::numeric_limits<float>::infinity();
    std::vector<float> mosts(pieces);
    for (int64_t piece = 0; piece < pieces; piece++) {
        const float *from = numbers + piece * PIECE;
        const float most = largest_of(larger(larger(load(from), load(from + LANES)),
                                             larger(load(from + 2 * LANES), load(from + 3 * LANES))));
        mosts[piece] = std::isnan(most) ? least : most; // a NaN is never found, and has no place in any order
    }
    if (pieces > width) {
        std::vector<float> sorted = mosts;
        std::nth_element(sorted.begin(), sorted.begin() + width - 1, sorted.end(), std::greater<float>());
        least = sorted[width - 1];
    }
    std::vector<std::pair<float, int64_t>> found;
    found.reserve(4 * width);
    for (int64_t piece = 0; piece < pieces; piece++)
        if (mosts[piece] >= least)
            for (int64_t i = piece * PIECE; i < (piece + 1) * PIECE; i++)
                if (numbers[i] >= least) found.emplace_back(numbers[i], i);
    for (int64_t i = pieces * PIECE; i < count; i++)
        if (numbers[i] >= least) found.emplace_back(numbers[i], i);
    if (width < int64_t(found.size()))
        std::nth_element(found.begin(), found.begin() + width - 1, found.end(),
                         [](const auto &one, const auto &two) { return one.first > two.first; });
    for (int64_t i = 0; i < width; i++) places[i] = i < int64_t(found.size()) ? found[i].second : 0;
}

float log_sum_exp(const float *numbers, int64_t count) {
    const int64_t whole = count / LANES * LANES;
    float most = -std::numeric_limits<float>::infinity();
    if (whole) {
        Floats mosts = load(numbers);
        for (int64_t i = LANES; i < whole; i += LANES) mosts = larger(mosts, load(numbers + i));
        most = largest_of(mosts);
    }
    for (int64_t i = whole; i < count; i++) most = numbers[i] > most ? numbers[i] : most;
    if (std::isinf(most))
        return std::any_of(numbers, numbers + count, [](float x) { return std::isnan(x); }) ? NAN : most;
    const Floats log2e = all(1.44269504088896f), minus = all(-most);
    double sum = 0;
    for (int64_t i = 0; i < whole;) { // float32 within a few hundred numbers, float64 between them
        Floats part = {};
        for (const int64_t end = i + 64 * LANES < whole ? i + 64 * LANES : whole; i < end; i += LANES)
            part += power_of_two((load(numbers + i) + minus) * log2e);
        sum += sum_of(part);
    }
    for (int64_t i = whole; i < count; i++) sum += std::exp(numbers[i] - most);
    return float(most + std::log(sum));
}

// Products of rows with the weight of a linear layer, in bfloat16. A weight (outputs, inputs) is laid out once: for LANES
// outputs at a time, `words` vectors of two inputs each. A number of the answer is one sum over the inputs in their order,
// rounded once, in a tile of any size.

constexpr int OUTPUTS = 3; // vectors of outputs in a tile; of rows there are TALL, and their sums fill the registers
constexpr int TALL = 8;
constexpr int64_t TOGETHER = 256; // rows that are taken through all weights, with `DEEP` words of a tile's at a time:
constexpr int64_t DEEP = 1024;    // so much of both stays in the second cache

void lay_out(const uint16_t *weight, int64_t outputs, int64_t inputs, uint32_t *to) {
    const int64_t words = (inputs + 1) / 2, vectors = (outputs + LANES - 1) / LANES;
#pragma omp parallel for schedule(static) if (vectors * words > SMALL)
    for (int64_t vector = 0; vector < vectors; vector++) {
        const uint16_t *from = weight + vector * LANES * inputs;
        uint32_t *mine = to + vector * words * LANES;
        const int count = outputs - vector * LANES < LANES ? outputs - vector * LANES : LANES;
        int64_t at = 0;
        for (; count == LANES && inputs % 2 == 0 && at + LANES <= words; at += LANES)
            transpose((const uint32_t *)from + at, words, mine + at * LANES, LANES);
        for (; at < words; at++)
            for (int i = 0; i < LANES; i++) {
                uint16_t pair[2] = {0, 0};
                if (i < count) std::memcpy(pair, from + i * inputs + 2 * at, 2 * (2 * at + 1 < inputs ? 2 : 1));
                std::memcpy(mine + at * LANES + i, pair, 4);
            }
    }
}

// What a tile has to do: words [begin, end) of its weights; earlier ones are in `sums`, and later ones come.
struct Tile {
    const uint16_t *x;
    int64_t x_row, words, begin, end;
    const uint32_t *weights;
    Floats *sums;             // (ROWS, OUTPUTS)
    const Floats *bias;       // (OUTPUTS,)
    uint16_t *out;
    int64_t out_row, outputs; // of which there are so many in the tile
    const uint32_t *next;     // what is read afterwards: word by word, and vector by vector `ahead` of them
    int ahead;
};

template <int ROWS, int VECTORS> void product_tile(const Tile &tile) {
    const int64_t words = tile.words, x_row = tile.x_row, begin = tile.begin, end = tile.end;
    const uint16_t *x = tile.x;
    const uint32_t *weights = tile.weights, *next = tile.next;
    const int ahead = tile.ahead;
    Floats sums[ROWS][VECTORS] = {};
    for (int row = 0; begin > 0 && row < ROWS; row++)
        for (int v = 0; v < VECTORS; v++) sums[row][v] = tile.sums[row * OUTPUTS + v];
    for (int64_t at = begin; at < end; at++, next += LANES) {
        for (int i = 0; i < ahead; i++) __builtin_prefetch(next + i * words * LANES, 0, 2);
        Words many[VECTORS];
        for (int v = 0; v < VECTORS; v++) many[v] = load(weights + (v * words + at) * LANES);
        for (int row = 0; row < ROWS; row++) {
            uint32_t one;
            std::memcpy(&one, x + row * x_row + 2 * at, 4);
            for (int v = 0; v < VECTORS; v++) sums[row][v] = Half::products(sums[row][v], one, many[v]);
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < VECTORS; v++) {
            if (end < words) {
                tile.sums[row * OUTPUTS + v] = sums[row][v];
                continue;
            }
            uint16_t *to = tile.out + row * tile.out_row + v * LANES;
            const Floats found = round_to<Half>(sums[row][v] + tile.bias[v]);
            if (tile.outputs - v * LANES >= LANES) narrow<Half>(to, found);
            else {
                uint16_t numbers[LANES];
                narrow<Half>(numbers, found);
                std::memcpy(to, numbers, 2 * (tile.outputs - v * LANES));
            }
        }
}

template <int ROWS, int VECTORS> void product_tile(int rows, int vectors, const Tile &tile) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return product_tile<ROWS - 1, VECTORS>(rows, vectors, tile);
    if constexpr (VECTORS > 1)
        if (vectors < VECTORS) return product_tile<ROWS, VECTORS - 1>(rows, vectors, tile);
    product_tile<ROWS, VECTORS>(tile);
}

inline const uint32_t *vector_of(const Weights &w, int64_t vector) {
    return (const uint32_t *)w.numbers + vector * w.words * LANES;
}

// Some rows times vectors [first, first + vectors) of outputs. `after`: those that the thread takes then.
void multiply_tiles(const uint16_t *x, int64_t x_row, const Weights &w, const uint16_t *bias, uint16_t *out, int64_t rows,
                    int64_t first, int vectors, int64_t after, Floats *sums) {
    const int64_t left = w.outputs - first * LANES, count = left < vectors * LANES ? left : vectors * LANES;
    uint16_t biases[OUTPUTS * LANES] = {};
    if (bias) std::memcpy(biases, bias + first * LANES, 2 * count);
    Floats wide_biases[OUTPUTS];
    for (int v = 0; v < OUTPUTS; v++) wide_biases[v] = wide<Half>(biases + v * LANES);
    const int64_t parts = (w.words + DEEP - 1) / DEEP, tiles = (rows + TALL - 1) / TALL;
    const int64_t ahead = (OUTPUTS + tiles - 1) / tiles;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t begin = w.words * part / parts, end = w.words * (part + 1) / parts;
        const uint32_t *next = part + 1 < parts ? vector_of(w, first) + end * LANES : vector_of(w, after);
        for (int64_t tile = 0, row = 0; tile < tiles; tile++) {
            const int tall = rows * (tile + 1) / tiles - row;
            const int64_t asked = tile * ahead;
            product_tile<TALL, OUTPUTS>(tall, vectors, {x + row * x_row, x_row, w.words, begin, end, vector_of(w, first),
                                                        sums + row * OUTPUTS, wide_biases,
                                                        out + row * w.outputs + first * LANES, w.outputs, count,
                                                        next + asked * w.words * LANES,
                                                        int(asked < OUTPUTS ? ahead : 0)});
            row += tall;
        }
    }
}

struct Product {
    const Weights *weights;
    const void *bias;
    uint16_t *out; // (rows, outputs), contiguous
};

// x (rows, 2 * words), rows `x_row` apart, with weights of `count` layers. Each thread has outputs of its own, so that it
// reads its part of the weights from memory once, and while it computes with some it asks for the next.
void multiply(const uint16_t *x, int64_t x_row, const Product *products, int count, int64_t rows) {
    int64_t numbers = 0;
    for (int i = 0; i < count; i++)
        numbers += (products[i].weights->outputs + LANES - 1) / LANES * products[i].weights->words;
#pragma omp parallel if (numbers > SMALL)
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        Floats sums[TOGETHER * OUTPUTS];
        for (int i = 0; i < count; i++) {
            const Weights &w = *products[i].weights;
            const int64_t vectors = (w.outputs + LANES - 1) / LANES;
            const int64_t begin = vectors * thread / threads, end = vectors * (thread + 1) / threads;
            for (int64_t row = 0; row < rows; row += TOGETHER)
                for (int64_t first = begin; first < end; first += OUTPUTS)
                    multiply_tiles(x + row * x_row, x_row, w, (const uint16_t *)products[i].bias,
                                   products[i].out + row * w.outputs, rows - row < TOGETHER ? rows - row : TOGETHER,
                                   first, end - first < OUTPUTS ? end - first : OUTPUTS,
                                   first + OUTPUTS < end ? first + OUTPUTS : begin, sums);
        }
    }
}

// x + y, as torch rounds it
void add_all(const uint16_t *x, const uint16_t *y, uint16_t *out, int64_t count) {
    const int64_t vectors = count / LANES;
#pragma omp parallel for schedule(static) if (count > SMALL)
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t i = v * LANES;
        narrow<Half>(out + i, round_to<Half>(wide<Half>(x + i) + wide<Half>(y + i)));
    }
    for (int64_t i = vectors * LANES; i < count; i++) out[i] = rounded(widened(x[i]) + widened(y[i]));
}

// What a layer has in memory besides its input and its output, for some rows. With no memory it tells how much it takes.
struct Room {
    char *next;
    int64_t bytes = 0;
    uint16_t *take(int64_t numbers) {
        char *here = next + bytes;
        bytes += (2 * numbers + 63) / 64 * 64;
        return (uint16_t *)here;
    }
};

} // namespace

extern "C" {

void attention(const Attention *a) {
    if (a->single) attend<Single>(a, 1, a->scratch);
    else attend<Half>(a, 1, a->scratch);
}

int64_t scratch_bytes(const Attention *a) { return packed_bytes(*a) + all_work_bytes(*a) + 64; }

void decode(const Decode *d) {
    const std::vector<Attention> all = requests(*d);
    for (size_t first = 0, end; first < all.size(); first = end) {
        end = end_of_turn(all, first);
        if (all[first].single) attend<Single>(&all[first], end - first, d->scratch);
        else attend<Half>(&all[first], end - first, d->scratch);
    }
}

int64_t decode_bytes(const Decode *d) {
    const std::vector<Attention> all = requests(*d);
    int64_t most = 0;
    for (size_t first = 0, end; first < all.size(); first = end) {
        end = end_of_turn(all, first);
        int64_t bytes = 0;
        for (size_t i = first; i < end; i++) bytes += packed_bytes(all[i]);
        most = bytes > most ? bytes : most;
    }
    return all.empty() ? 64 : most + all_work_bytes(all[0]) + 64;
}

void norm(const void *x, const void *weight, void *out, int64_t rows, int64_t width, float eps, int32_t single) {
    if (single) norm_rows<Single>((const float *)x, (const float *)weight, (float *)out, rows, width, eps);
    else norm_rows<Half>((const uint16_t *)x, (const uint16_t *)weight, (uint16_t *)out, rows, width, eps);
}

void gate(const void *gate, const void *up, void *out, int64_t count, int32_t single) {
    if (single) gate_all<Single>((const float *)gate, (const float *)up, (float *)out, count);
    else gate_all<Half>((const uint16_t *)gate, (const uint16_t *)up, (uint16_t *)out, count);
}

void rotate(const void *x, const int64_t *x_strides, void *out, const int64_t *out_strides, const void *cos,
            const void *sin, int64_t table_batch, int64_t batch, int64_t heads, int64_t tokens, int64_t width,
            int32_t single) {
    if (single)
        rotate_heads<Single>((const float *)x, x_strides, (float *)out, out_strides, (const float *)cos,
                             (const float *)sin, table_batch, batch, heads, tokens, width);
    else
        rotate_heads<Half>((const uint16_t *)x, x_strides, (uint16_t *)out, out_strides, (const uint16_t *)cos,
                           (const uint16_t *)sin, table_batch, batch, heads, tokens, width);
}

void largest(const float *numbers, int64_t stride, int64_t rows, int64_t count, int64_t width, int64_t *places) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++)
        largest_of_row(numbers + row * stride, count, width, places + row * width);
}

void logsumexp(const float *numbers, int64_t stride, int64_t rows, int64_t count, float *out) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) out[row] = log_sum_exp(numbers + row * stride, count);
}

// Whether rows are multiplied with weights as fast here as by torch: it takes products of pairs. (With tiles of AMX
// torch's may be faster.)
int32_t multiplies() {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    return 1;
#else
    return 0;
#endif
}

void pack(const void *weight, int64_t outputs, int64_t inputs, void *to) {
    lay_out((const uint16_t *)weight, outputs, inputs, (uint32_t *)to);
}

void product(const void *x, int64_t x_row, const Weights *weights, const void *bias, void *out, int64_t rows) {
    const Product one = {weights, bias, (uint16_t *)out};
    multiply((const uint16_t *)x, x_row, &one, 1, rows);
}

// A decode step of one layer: x -> out, (rows, hidden), the rows of `d.groups` and padding behind them. It rounds where
// the model's own operators do, and what it stores are keys and values. Of `d`, what depends on the layer's own queries
// is filled in here. cos, sin: (rows, width) or, with table_row 0, (1, width).
// Returns 0, or the bytes of `scratch` that are needed if `bytes` are too few; then nothing is done.
int64_t layer(const Layer *l, const Decode *groups, const void *x, const void *cos, const void *sin, int64_t table_row,
              int64_t rows, void *out, void *scratch, int64_t bytes) {
    const int64_t width = l->width, hidden = l->output.outputs, inner = l->gate.outputs;
    const int64_t heads = l->query.outputs / width, kv_heads = l->key.outputs / width;
    Room room{(char *)scratch};
    uint16_t *normed = room.take(rows * hidden), *queries = room.take(rows * heads * width);
    uint16_t *keys = room.take(rows * kv_heads * width), *values = room.take(rows * kv_heads * width);
    uint16_t *attended = room.take(rows * heads * width), *added = room.take(rows * hidden);
    uint16_t *gates = room.take(rows * inner), *ups = room.take(rows * inner);
    Decode d = *groups;
    d.query = queries, d.query_row = heads * width, d.query_head = width;
    d.key = keys, d.key_row = kv_heads * width, d.key_head = width;
    d.value = values, d.value_row = kv_heads * width, d.value_head = width;
    d.out = attended, d.out_row = heads * width, d.out_head = width;
    d.scratch = (char *)scratch + room.bytes;
    const int64_t needed = room.bytes + decode_bytes(&d);
    if (needed > bytes) return needed;

    norm_rows<Half>((const uint16_t *)x, (const uint16_t *)l->before_attention, normed, rows, hidden,
                    l->before_attention_eps);
    const Product of_attention[] = {{&l->query, l->query_bias, queries},
                                    {&l->key, l->key_bias, keys},
                                    {&l->value, l->value_bias, values}};
    multiply(normed, hidden, of_attention, 3, rows);
    if (l->of_queries)
        norm_rows<Half>(queries, (const uint16_t *)l->of_queries, queries, rows * heads, width, l->of_queries_eps);
    if (l->of_keys)
        norm_rows<Half>(keys, (const uint16_t *)l->of_keys, keys, rows * kv_heads, width, l->of_keys_eps);
    for (auto [numbers, count] : {std::pair(queries, heads), std::pair(keys, kv_heads)}) {
        if (!l->rotates) break;
        const int64_t strides[] = {count * width, width, count * width};
        rotate_heads<Half>(numbers, strides, numbers, strides, (const uint16_t *)cos, (const uint16_t *)sin, table_row,
                           rows, count, 1, width);
    }
    int64_t ours = 0;
    for (int64_t i = 0; i < d.count; i++) ours += d.rows[i];
    decode(&d);
    std::memset(attended + ours * heads * width, 0, 2 * (rows - ours) * heads * width);
    const Product of_output = {&l->output, l->output_bias, normed};
    multiply(attended, heads * width, &of_output, 1, rows);
    add_all((const uint16_t *)x, normed, added, rows * hidden);

    norm_rows<Half>(added, (const uint16_t *)l->before_mlp, normed, rows, hidden, l->before_mlp_eps);
    const Product of_mlp[] = {{&l->gate, l->gate_bias, gates}, {&l->up, l->up_bias, ups}};
    multiply(normed, hidden, of_mlp, 2, rows);
    gate_all<Half>(gates, ups, gates, rows * inner);
    const Product of_down = {&l->down, l->down_bias, normed};
    multiply(gates, inner, &of_down, 1, rows);
    add_all(added, normed, (uint16_t *)out, rows * hidden);
    return 0;
}

int32_t threads() { return omp_get_max_threads(); }

} // extern "C"
