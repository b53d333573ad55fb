// The module _core, and the bindings of calls, random numbers and threads. Only bind*.cpp know Python: they check
// arrays, take pointers, release the GIL and call the engine.
#include "bind.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/decode_kernels.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "rng.h"

namespace tipl {

namespace {

// A context manager for Python objects that allow one call at a time: `with Turn([in_use], "fit", "the estimator"):`. A
// call by another thread waits. A call by a signal handler is refused, since it would wait for its own thread. Calls
// that need several objects all take them in the same order, so that no two wait for each other.
class Turn {
 public:
  Turn(const py::iterable &objects, std::string where, std::string what)
      : objects_(objects), where_(std::move(where)), what_(std::move(what)) {
    for (const py::handle object : objects_) in_use_.push_back(object.cast<InUse *>());
    check(std::find(in_use_.begin(), in_use_.end(), nullptr) == in_use_.end(), "Turn: objects must be InUse, got None");
    std::sort(in_use_.begin(), in_use_.end());
    in_use_.erase(std::unique(in_use_.begin(), in_use_.end()), in_use_.end());
  }

  void enter() {
    check_state(taken_ == 0, where_, ": this turn is taken already");
    try {
      for (; taken_ < in_use_.size(); ++taken_) check_free(take(*in_use_[taken_]), where_.c_str(), what_.c_str());
    } catch (...) {
      leave();
      throw;
    }
  }

  void leave() noexcept {
    for (; taken_ > 0; --taken_) in_use_[taken_ - 1]->leave();
  }

 private:
  static InUse::Holder take(InUse &object) {
    const InUse::Holder first = object.take();
    if (first != InUse::Holder::kOtherThread) return first;
    return without_gil([&](Poll &poll) {
      constexpr auto kLongest = std::chrono::microseconds(1000);
      auto nap = std::chrono::microseconds(10);
      for (;;) {
        std::this_thread::sleep_for(nap);
        poll(0);
        const InUse::Holder holder = object.take();
        if (holder != InUse::Holder::kOtherThread) return holder;
        nap = std::min(2 * nap, kLongest);
      }
    });
  }

  const py::tuple objects_;
  const std::string where_, what_;
  std::vector<InUse *> in_use_;  // in the order in which they are taken
  size_t taken_ = 0;
};

void bind_calls(py::module_ &m) {
  py::class_<InUse>(m, "InUse", "Marks whether a call is using an object. Copies and unpickled ones are free.")
      .def(py::init<>())
      .def("__reduce__", [](const py::object &self) { return py::make_tuple(py::type::of(self), py::tuple()); });
  py::class_<Turn>(m, "Turn", "A context manager that gives a call exclusive use of some objects.")
      .def(py::init<const py::iterable &, std::string, std::string>(), py::arg("objects"), py::arg("where"),
           py::arg("what"))
      .def("__enter__", &Turn::enter)
      .def("__exit__", [](Turn &turn, const py::args &) { turn.leave(); });
}

// ---- engine: instruction set, random numbers, threads

struct BoundPool : ThreadPool {
  using ThreadPool::ThreadPool;
  InUse in_use;
};

// For the tests of the pool: returns the rank that ran each of `items` items. The items in `fail_at` throw on their
// threads instead.
py::array_t<int32_t> pool_owners(BoundPool &pool, int items, const std::vector<ptrdiff_t> &fail_at) {
  check(items >= 0, "owners: items must be >= 0, got ", items);
  const InUse::Hold hold(pool.in_use, "owners", "the pool");
  py::array_t<int32_t> owners(items);
  int32_t *owner = owners.mutable_data();
  without_gil([&](Poll &poll) {
    pool.run(poll, [&](int rank) {
      const Range mine = share(items, rank, pool.size());
      for (ptrdiff_t item = mine.begin; item < mine.end; ++item) {
        poll(rank);
        const bool fails = std::find(fail_at.begin(), fail_at.end(), item) != fail_at.end();
        check_state(!fails, "owners: item ", item, " failed on rank ", rank);
        owner[item] = rank;
      }
    });
  });
  return owners;
}

// For the tests of the pool: whether no rank ever passed one of `rounds` barriers before all ranks had reached it.
bool pool_barriers_hold(BoundPool &pool, int rounds) {
  const InUse::Hold use(pool.in_use, "barriers_hold", "the pool");
  return without_gil([&](Poll &poll) {
    std::vector<int> reached(pool.size());  // each rank writes its own before a barrier, and all read them after it
    std::atomic<bool> hold = true;
    bool stopped = false;  // rank 0 writes it before a barrier, and all read it after it
    pool.run([&](int rank) noexcept {
      for (int round = 1; round <= rounds && !stopped; ++round) {
        reached[rank] = round;
        pool.barrier(rank);
        for (const int other : reached) {
          if (other != round) hold = false;
        }
        if (rank == 0) stopped = poll.stopped(0);
        pool.barrier(rank);
      }
    });
    if (stopped) throw Interrupted();
    return hold.load();
  });
}

// For the tests of calls: rank 0 waits while the others sleep, which no answer of the poll shortens.
double pool_sleeps(BoundPool &pool, double seconds) {
  check(seconds >= 0.0 && seconds <= 60.0, "sleeps: seconds must lie in [0, 60], got ", seconds);
  const InUse::Hold hold(pool.in_use, "sleeps", "the pool");
  return without_gil([&](Poll &poll) {
    pool.run(poll, [&](int rank) {
      if (rank != 0) std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
    });
    return seconds;
  });
}

void bind_engine(py::module_ &m) {
  m.def("isa", [] { return chosen_isa(); }, "The instruction set in use: baseline, avx2, avx512 or avx512bf16.");
  m.def(
      "lanes", [] { return decode_kernels().lanes; },
      "How many floats one register of the instruction set in use holds.");
  m.def("choose_isa", &choose_isa, py::arg("name"), py::arg("supported"),
        "The instruction set that TIPL_ISA=name (None: unset) picks on a CPU with the `supported` ones, worst first.");
  m.def("available_cpus", &available_cpus, "The number of cores that this process may use.");
  m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"), "Four random words of Philox4x32-10.");
  m.def("normal4", &normal4, py::arg("seed"), py::arg("stream"), py::arg("index"),
        "Four standard normal numbers: block `index` of a stream.");

  py::class_<BoundPool>(m, "ThreadPool", "The engine's thread pool, as its tests see it.")
      .def(py::init<ptrdiff_t>(), py::arg("num_threads"))
      .def_property_readonly("size", [](const BoundPool &pool) { return pool.size(); })
      .def("owners", &pool_owners, py::arg("items"), py::arg("fail_at") = std::vector<ptrdiff_t>(),
           "The rank that ran each item, int32 (items,). The items in `fail_at` throw on their threads.")
      .def("barriers_hold", &pool_barriers_hold, py::arg("rounds"),
           "Whether no rank ever passed a barrier before all had reached it.")
      .def("sleeps", &pool_sleeps, py::arg("seconds"), "Sleeps on all threads but the one that waits for them.");
}

}  // namespace
}  // namespace tipl

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native engine of tipl.";
  tipl::select_isa(std::getenv("TIPL_ISA"));  // throws: the import fails with its text
  tipl::bind_calls(m);
  tipl::bind_engine(m);
  tipl::bind_decoder(m);
  tipl::bind_gradient(m);
  tipl::bind_refiner(m);
  tipl::bind_svd(m);
  tipl::bind_ppo(m);
}
