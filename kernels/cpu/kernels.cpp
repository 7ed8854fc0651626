// Compiled once for each instruction set, with TARGET its name.
#include "kernels.h"

#include "attention.h"
#include "elementwise.h"
#include "energy.h"
#include "linear.h"
#include "mass.h"
#include "moments.h"
#include "pages.h"
#include "reading.h"
#include "rows.h"

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define TEXT2(a) #a
#define TEXT(a) TEXT2(a)

namespace winnow {
extern const Kernels JOIN(kernels_, TARGET) = {
    TEXT(TARGET),       TARGET::pack,      TARGET::linear,         TARGET::embed,      TARGET::rms_norm, TARGET::silu_mul,
    TARGET::rope_write, TARGET::attention, TARGET::attention_mass, TARGET::choose_reads, TARGET::query_energy,
    TARGET::query_moments,
    TARGET::read_lanes, TARGET::write_lanes, TARGET::repack, TARGET::nearest_rows, TARGET::sum_rows,
};
}
