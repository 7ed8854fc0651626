// The table of kernels that every instruction set fills (kernels.cpp) and module.cpp chooses from at run time.
// Sizes are in elements unless named otherwise. Kernels return false where an index would leave its array.
#pragma once
#include <cstdint>

namespace winnow {

// PageFormat in kernels/formats
enum Format : uint8_t {
  F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3, INT2 = 4, FP8 = 5, F16 = 6, MUSTAFAR50 = 7, MUSTAFAR70 = 8,
  GEAR = 9, THINK = 10, MATRYOSHKA = 11, CSKV = 12, MINI_CACHE = 13, FORMATS = 14
};
constexpr int MOST_PARTS = 16;

struct PageShape {  // of one format; from layout.py, bytes
  int capacity, key_block, value_block;
  int64_t values, k_scale, k_zero, v_scale, v_zero;
  int64_t parts[MOST_PARTS + 1];  // of pages that are opened: where each part begins, and the last one ends
};

struct Bases {  // Bases in bases.py; null where there are none
  const float* keys;    // [layers, heads, dim, rank]
  const float* values;  // [layers, heads, rank, dim]
};

struct Rope {  // Rope in bases.py
  const float *cos, *sin;  // [positions, dim / 2]
  int positions;
  double factor;
};

struct KV {  // PagedKV in kv.py
  uint8_t* data;
  int64_t pages, page_bytes;
  const int32_t* table;   // [slots, layers, heads, width]
  const int32_t* kept;    // [slots, layers, heads]
  const int32_t* sealed;  // [slots, layers, heads]
  const uint8_t* formats; // [slots]
  const int32_t* rest;    // [slots, layers, heads]
  const uint8_t* rest_formats;  // [slots]
  int slots, layers, heads, width, dim;
  Format compute;
  PageShape shapes[FORMATS];
  Bases bases[FORMATS];
  Rope rope;
};

// What a row does in a layer; the values of ReadMode in reading.py. Rows that choose before they read, or while they
// read all, write down what they chose.
enum ReadMode : uint8_t { READ_ALL = 0, READ_ALL_AND_CHOOSE = 1, READ_CHOSEN = 2, READ_CHOSEN_BEFORE = 3 };

struct Reading {  // ReadRule and ReadState of one sequence (reading.py)
  const uint8_t* modes;  // [layers]; null where the sequence reads all
  bool by_bounds, by_layer;
  int tokens, sinks, recent, pool;
  double share;                 // of the tokens seen, in place of `tokens` where it is positive
  float similarity;             // above 1: every row chooses anew
  const int32_t* channels;      // [layers, heads, channel_count]
  int channel_count;
  uint16_t* bounds;             // [layers, heads, bounds_capacity, 2, dim] bf16
  int32_t* bounded;             // [layers, heads]
  int bounds_capacity;
  float* anchors;               // [layers, q_heads, dim]
  int32_t* anchored;            // [layers]
  uint8_t* anchor_choice;       // [layers, anchor_capacity]
  int anchor_capacity, anchor_heads;
  uint8_t* choice;              // [rows, heads, choice_capacity]: this step's
  int choice_capacity;
  int64_t* touched;             // [3]: bytes read, bytes that reading all takes, rows
};

struct Vote {  // Vote in vote.py
  bool is_max;
  float decay, temperature, heating;
  int warm_from;
  const float* noise;  // shaped as the mass, or null
};

struct Energy {  // Energy in kv.py; null sums where there is none
  double* sums;  // [layers, heads, dim]
  int first, last;
};

struct Batch {  // LaneBatch in kv.py
  int size, rows;
  const int32_t *slots, *cu_rows, *positions;
  const int32_t* angles;  // [rows]: the row of the rotation tables that each is turned by
  // Per sequence, null where it has none: attention mass to add to, logical positions of its lanes' tokens, and log
  // weights that are added to their scores, all [layers, heads, capacity]; moments of queries to add to, [layers,
  // q_heads, 1 + dim, dim]; sums of squares of queries to add to; and the first row that votes, and how.
  float* const* mass;
  const Vote* votes;
  double* const* moments;
  const Energy* energy;
  const int32_t* const* lane_positions;
  const float* const* log_weights;
  const int32_t *mass_capacity, *positions_capacity, *log_weights_capacity, *first_vote;
  const Reading* reading;  // per sequence; null where all of them read all
};

struct Positions { const int32_t* data; int capacity; };  // of a slot, [layers, heads, capacity]; null where it has none

struct Rest {  // the second sealed part of lanes to write, Rest in kv.py; null arrays where there is none
  const int32_t *start, *pages;  // [layers, heads]
  Format fmt;
  int merged_from;  // LayerMerge: the lower layer of the first pair, negative where none is merged; and t
  double t;
};

struct Matrix {  // packed by pack(): panels of 16 output rows, [panels][cols][16]
  const void* panels;
  const float* scale;  // [panels][groups of 64 columns][16], null for f32
  const float* bias;   // or null
  int rows, cols;
  bool is_int8;
};

struct Kernels {
  const char* name;
  void (*pack)(const float* weight, int rows, int cols, bool is_int8, void* panels, float* scale);
  void (*linear)(const Matrix& w, const float* x, int count, float* out, bool accumulate);
  bool (*embed)(const Matrix& w, const int32_t* tokens, int count, float* out);
  void (*rms_norm)(const float* x, const float* weight, float eps, int count, int width, float* out);
  void (*silu_mul)(const float* gate_up, int count, int width, float* out);
  bool (*rope_write)(const KV& kv, const Batch& batch, int layer, const float* qkv, int q_heads, const float* cos,
                     const float* sin, int angles, const float* q_norm, const float* k_norm, float eps,
                     float* q_out);
  bool (*attention)(const KV& kv, const Batch& batch, int layer, const float* q, int q_heads, float scale, int window,
                    float* out, float* lse);
  bool (*attention_mass)(const KV& kv, const Batch& batch, int layer, const float* q, int q_heads, float scale,
                         int window, const float* lse);
  bool (*choose_reads)(const KV& kv, const Batch& batch, int layer, const float* q, int q_heads, float scale, int window);
  bool (*query_energy)(const KV& kv, const Batch& batch, int layer, const float* q, int q_heads);
  bool (*query_moments)(const KV& kv, const Batch& batch, int layer, const float* qkv, int q_heads, const float* q_norm,
                        float eps);
  bool (*read_lanes)(const KV& kv, int slot, int layer, const Positions& positions, int count, float* keys,
                     float* values);
  bool (*write_lanes)(const KV& kv, int slot, int layer, int count, const float* keys, const float* values,
                      const int32_t* positions, const int32_t* counts, const int32_t* start, const int32_t* dst_table, int dst_width,
                      const int32_t* dst_sealed, Format fmt, const uint8_t* stays);
  bool (*repack)(const KV& kv, int slot, const int32_t* keep, int keep_width, const int32_t* counts,
                 const int32_t* start, const int32_t* dst_table, int dst_width, const int32_t* dst_sealed, Format fmt,
                 const Rest& rest, const Positions& positions, const uint8_t* stays);
  bool (*nearest_rows)(const float* x, const int32_t* x_counts, const float* y, const int32_t* y_counts, int lanes, int n,
                       int m, int dim, int32_t* index, float* cosine);
  bool (*sum_rows)(const float* x, const float* weights, const int32_t* index, int lanes, int n, int m, int dim,
                   float* sums, float* totals);
};

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

}  // namespace winnow
