// The Python module winnow.kernels._cpu. Tensors arrive as addresses: a call costs about two microseconds that way and
// sixty through DLPack. winnow/kernels/cpu/__init__.py is its only caller and checks shapes and types.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <omp.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace winnow;

static const Kernels* find(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (avx512 && (name.empty() || name == "avx512")) return &kernels_avx512;
  if (avx2 && (name.empty() || name == "avx2")) return &kernels_avx2;
#endif
  if (name.empty() || name == "generic") return &kernels_generic;
  return nullptr;
}
static const Kernels* active = nullptr;

template <class T> static T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }
static void check(bool ok, const char* kernel) {
  if (!ok) throw std::out_of_range(std::string(kernel) + ": an index lies outside its array");
}

static PageShape shape_of(const std::vector<int64_t>& v) {
  PageShape shape = {(int)v.at(0), (int)v.at(1), (int)v.at(2), v.at(3), v.at(4), v.at(5), v.at(6), v.at(7), {}};
  for (size_t i = 8; i < v.size(); i++) {
    if (i - 8 > MOST_PARTS) throw std::invalid_argument("a page has too many parts");
    shape.parts[i - 8] = v[i];
  }
  return shape;
}

struct PyKV : KV {
  PyKV(uintptr_t data_, int64_t pages_, int64_t page_bytes_, int dim_, int compute_, std::vector<std::vector<int64_t>> s) {
    data = at<uint8_t>(data_);
    pages = pages_;
    page_bytes = page_bytes_;
    dim = dim_;
    compute = (Format)compute_;
    for (int f = 0; f < FORMATS; f++) {
      shapes[f] = shape_of(s.at(f));
      bases[f] = {nullptr, nullptr};
    }
    rope = {nullptr, nullptr, 0, 1.0};
    table = kept = sealed = rest = nullptr;
    formats = rest_formats = nullptr;
    slots = layers = heads = width = 0;
  }
  void bind(uintptr_t table_, uintptr_t kept_, uintptr_t sealed_, uintptr_t formats_, uintptr_t rest_,
            uintptr_t rest_formats_, int slots_, int layers_, int heads_, int width_) {
    table = at<const int32_t>(table_);
    kept = at<const int32_t>(kept_);
    sealed = at<const int32_t>(sealed_);
    formats = at<const uint8_t>(formats_);
    rest = at<const int32_t>(rest_);
    rest_formats = at<const uint8_t>(rest_formats_);
    slots = slots_;
    layers = layers_;
    heads = heads_;
    width = width_;
  }
};

static void set_bases(PyKV& kv, int fmt, uintptr_t keys, uintptr_t values) {
  if (fmt < 0 || fmt >= FORMATS) throw std::invalid_argument("there is no such format");
  kv.bases[fmt] = {at<const float>(keys), at<const float>(values)};
}
static void set_rope(PyKV& kv, uintptr_t cos, uintptr_t sin, int positions, double factor) {
  kv.rope = {at<const float>(cos), at<const float>(sin), positions, factor};
}

struct PyBatch : Batch {
  std::vector<float*> mass_;
  std::vector<const int32_t*> positions_;
  std::vector<Vote> votes_;
  std::vector<double*> moments_;
  std::vector<Energy> energy_;
  std::vector<const float*> log_weights_;
  std::vector<int32_t> mass_capacity_, positions_capacity_, log_weights_capacity_;
  std::vector<Reading> reading_;
  PyBatch(int size_, int rows_, uintptr_t slots_, uintptr_t cu_rows_, uintptr_t rows_positions, uintptr_t angles_,
          uintptr_t first_vote_)
      : mass_(size_), positions_(size_), votes_(size_), moments_(size_), energy_(size_), log_weights_(size_), mass_capacity_(size_),
        positions_capacity_(size_), log_weights_capacity_(size_), reading_(size_) {
    size = size_;
    rows = rows_;
    slots = at<const int32_t>(slots_);
    cu_rows = at<const int32_t>(cu_rows_);
    positions = at<const int32_t>(rows_positions);
    angles = at<const int32_t>(angles_);
    first_vote = at<const int32_t>(first_vote_);
    mass = mass_.data();
    votes = votes_.data();
    moments = moments_.data();
    energy = energy_.data();
    lane_positions = positions_.data();
    mass_capacity = mass_capacity_.data();
    positions_capacity = positions_capacity_.data();
    log_weights = log_weights_.data();
    log_weights_capacity = log_weights_capacity_.data();
    reading = nullptr;
  }
  PyBatch(const PyBatch&) = delete;
  void set_mass(int b, uintptr_t p, int capacity, bool is_max, float decay, float temperature, float heating, int warm_from,
                uintptr_t noise) {
    mass_.at(b) = at<float>(p);
    mass_capacity_.at(b) = capacity;
    votes_.at(b) = {is_max, decay, temperature, heating, warm_from, at<const float>(noise)};
  }
  void set_moments(int b, uintptr_t p) { moments_.at(b) = at<double>(p); }
  void set_energy(int b, uintptr_t sums, int first, int last) { energy_.at(b) = {at<double>(sums), first, last}; }
  void set_positions(int b, uintptr_t p, int capacity) { positions_.at(b) = at<const int32_t>(p); positions_capacity_.at(b) = capacity; }
  void set_log_weights(int b, uintptr_t p, int capacity) { log_weights_.at(b) = at<const float>(p); log_weights_capacity_.at(b) = capacity; }
  void set_reading(int b, uintptr_t modes, bool by_bounds, bool by_layer, int tokens, double share, int sinks, int recent, int pool,
                   float similarity, uintptr_t channels, int channel_count, uintptr_t bounds, uintptr_t bounded, int bounds_capacity,
                   uintptr_t anchors, uintptr_t anchored, uintptr_t anchor_choice, int anchor_capacity, int anchor_heads, uintptr_t choice,
                   int choice_capacity, uintptr_t touched) {
    reading_.at(b) = {at<const uint8_t>(modes), by_bounds, by_layer, tokens, sinks, recent, pool, share, similarity,
                      at<const int32_t>(channels), channel_count, at<uint16_t>(bounds), at<int32_t>(bounded), bounds_capacity,
                      at<float>(anchors), at<int32_t>(anchored), at<uint8_t>(anchor_choice), anchor_capacity, anchor_heads, at<uint8_t>(choice),
                      choice_capacity, at<int64_t>(touched)};
    reading = reading_.data();
  }
};

struct PyMatrix : Matrix {
  PyMatrix(uintptr_t panels_, uintptr_t scale_, uintptr_t bias_, int rows_, int cols_, bool is_int8_) {
    panels = at<const void>(panels_);
    scale = at<const float>(scale_);
    bias = at<const float>(bias_);
    rows = rows_;
    cols = cols_;
    is_int8 = is_int8_;
  }
};

NB_MODULE(_cpu, m) {
  nb::set_leak_warnings(false);  // what frames still hold when a process is told to end is not freed before it does
  active = find("");
  if (const char* wanted = std::getenv("WINNOW_CPU_TARGET")) {
    active = find(wanted);
    if (!active) throw std::runtime_error("WINNOW_CPU_TARGET names a target that this machine does not have");
  }
  using release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<PyKV>(m, "KV")
      .def(nb::init<uintptr_t, int64_t, int64_t, int, int, std::vector<std::vector<int64_t>>>())
      .def("bind", &PyKV::bind)
      .def("set_bases", &set_bases)
      .def("set_rope", &set_rope);
  nb::class_<PyBatch>(m, "Batch")
      .def(nb::init<int, int, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>())
      .def("set_mass", &PyBatch::set_mass)
      .def("set_moments", &PyBatch::set_moments)
      .def("set_energy", &PyBatch::set_energy)
      .def("set_positions", &PyBatch::set_positions)
      .def("set_log_weights", &PyBatch::set_log_weights)
      .def("set_reading", &PyBatch::set_reading);
  nb::class_<PyMatrix>(m, "Matrix").def(nb::init<uintptr_t, uintptr_t, uintptr_t, int, int, bool>());
  m.def("target", [] { return std::string(active->name); });
  m.def("use", [](const std::string& name) {
    const Kernels* k = find(name);
    if (!k) throw std::invalid_argument("this machine has no target '" + name + "'");
    active = k;
  });
  m.def("threads", [](int n) { if (n > 0) omp_set_num_threads(n); return omp_get_max_threads(); });
  m.def("pack", [](uintptr_t weight, int rows, int cols, bool is_int8, uintptr_t panels, uintptr_t scale) {
    active->pack(at<const float>(weight), rows, cols, is_int8, at<void>(panels), at<float>(scale));
  }, release());
  m.def("linear", [](const PyMatrix& w, uintptr_t x, int count, uintptr_t out, bool accumulate) {
    active->linear(w, at<const float>(x), count, at<float>(out), accumulate);
  }, release());
  m.def("embed", [](const PyMatrix& w, uintptr_t tokens, int count, uintptr_t out) {
    check(active->embed(w, at<const int32_t>(tokens), count, at<float>(out)), "embed");
  }, release());
  m.def("rms_norm", [](uintptr_t x, uintptr_t weight, float eps, int count, int width, uintptr_t out) {
    active->rms_norm(at<const float>(x), at<const float>(weight), eps, count, width, at<float>(out));
  }, release());
  m.def("silu_mul", [](uintptr_t x, int count, int width, uintptr_t out) {
    active->silu_mul(at<const float>(x), count, width, at<float>(out));
  }, release());
  m.def("rope_write", [](const PyKV& kv, const PyBatch& batch, int layer, uintptr_t qkv, int q_heads, uintptr_t cos, uintptr_t sin,
                         int angles, uintptr_t q_norm, uintptr_t k_norm, float eps, uintptr_t q_out) {
    check(active->rope_write(kv, batch, layer, at<const float>(qkv), q_heads, at<const float>(cos), at<const float>(sin), angles,
                             at<const float>(q_norm), at<const float>(k_norm), eps, at<float>(q_out)), "rope_write");
  }, release());
  m.def("attention", [](const PyKV& kv, const PyBatch& batch, int layer, uintptr_t q, int q_heads, float scale, int window,
                        uintptr_t out, uintptr_t lse, bool votes) {
    check(active->attention(kv, batch, layer, at<const float>(q), q_heads, scale, window, at<float>(out), at<float>(lse)), "attention");
    if (votes)
      check(active->attention_mass(kv, batch, layer, at<const float>(q), q_heads, scale, window, at<const float>(lse)), "attention_mass");
  }, release());
  m.def("choose_reads", [](const PyKV& kv, const PyBatch& batch, int layer, uintptr_t q, int q_heads, float scale, int window) {
    check(active->choose_reads(kv, batch, layer, at<const float>(q), q_heads, scale, window), "choose_reads");
  }, release());
  m.def("query_energy", [](const PyKV& kv, const PyBatch& batch, int layer, uintptr_t q, int q_heads) {
    check(active->query_energy(kv, batch, layer, at<const float>(q), q_heads), "query_energy");
  }, release());
  m.def("query_moments", [](const PyKV& kv, const PyBatch& batch, int layer, uintptr_t qkv, int q_heads, uintptr_t q_norm, float eps) {
    check(active->query_moments(kv, batch, layer, at<const float>(qkv), q_heads, at<const float>(q_norm), eps), "query_moments");
  }, release());
  m.def("read_lanes", [](const PyKV& kv, int slot, int layer, uintptr_t positions, int capacity, int count, uintptr_t keys, uintptr_t values) {
    const Positions of_slot = {at<const int32_t>(positions), capacity};
    check(active->read_lanes(kv, slot, layer, of_slot, count, at<float>(keys), at<float>(values)), "read_lanes");
  }, release());
  m.def("write_lanes", [](const PyKV& kv, int slot, int layer, int count, uintptr_t keys, uintptr_t values, uintptr_t positions, uintptr_t counts,
                          uintptr_t start, uintptr_t dst_table, int dst_width, uintptr_t dst_sealed, int fmt, uintptr_t stays) {
    check(active->write_lanes(kv, slot, layer, count, at<const float>(keys), at<const float>(values), at<const int32_t>(positions), at<const int32_t>(counts),
                              at<const int32_t>(start), at<const int32_t>(dst_table), dst_width, at<const int32_t>(dst_sealed),
                              (Format)fmt, at<const uint8_t>(stays)), "write_lanes");
  }, release());
  m.def("repack", [](const PyKV& kv, int slot, uintptr_t keep, int keep_width, uintptr_t counts, uintptr_t start, uintptr_t dst_table,
                     int dst_width, uintptr_t dst_sealed, int fmt, uintptr_t rest_start, uintptr_t rest_pages, int rest_fmt, int merged_from, double t,
                     uintptr_t positions, int capacity, uintptr_t stays) {
    const Positions of_slot = {at<const int32_t>(positions), capacity};
    const Rest rest = {at<const int32_t>(rest_start), at<const int32_t>(rest_pages), (Format)rest_fmt, merged_from, t};
    check(active->repack(kv, slot, at<const int32_t>(keep), keep_width, at<const int32_t>(counts), at<const int32_t>(start),
                         at<const int32_t>(dst_table), dst_width, at<const int32_t>(dst_sealed), (Format)fmt, rest, of_slot,
                         at<const uint8_t>(stays)), "repack");
  }, release());
  m.def("nearest_rows", [](uintptr_t x, uintptr_t x_counts, uintptr_t y, uintptr_t y_counts, int lanes, int n, int m, int dim,
                           uintptr_t index, uintptr_t cosine) {
    check(active->nearest_rows(at<const float>(x), at<const int32_t>(x_counts), at<const float>(y), at<const int32_t>(y_counts),
                               lanes, n, m, dim, at<int32_t>(index), at<float>(cosine)), "nearest_rows");
  }, release());
  m.def("sum_rows", [](uintptr_t x, uintptr_t weights, uintptr_t index, int lanes, int n, int m, int dim, uintptr_t sums,
                       uintptr_t totals) {
    check(active->sum_rows(at<const float>(x), at<const float>(weights), at<const int32_t>(index), lanes, n, m, dim,
                           at<float>(sums), at<float>(totals)), "sum_rows");
  }, release());
}
