// Whether passes run on all threads or on one, learned from how long they take.
//
// Threads that meet at barriers wait for one another: where another process shares the cores, each time slice that it
// takes from one thread stops all. Passes on all threads whose mean time, over a window, is far above the fastest are
// such passes. After a few such windows one is run on one thread, and what was quicker goes on for a while before both
// are tried again. Without other processes that hardly ever happens. Results have the same bits either way.
#pragma once

#include <algorithm>
#include <limits>

namespace tipl {

class TeamChoice {
 public:
  // Whether the next pass is to run on one thread.
  bool alone() const noexcept { return state_ == State::kTrial || state_ == State::kAlone; }

  // Tells of a pass of so many multiplications, run as alone() said.
  void took(double products, double seconds) noexcept {
    products_ += products;
    seconds_ += seconds;
    if (!alone()) fastest_ = std::min(fastest_, seconds / products);
    if (seconds_ < (state_ == State::kWatched || state_ == State::kTrial ? kWindow : patience_)) return;
    const double mean = seconds_ / products_;
    switch (state_) {
      case State::kWatched:
        if (mean <= kDisturbed * fastest_) {
          patience_ = kPatience;
          strikes_ = 0;
        } else if (++strikes_ >= kStrikes) {
          shared_ = mean;
          state_ = State::kTrial;
        }
        break;
      case State::kTrial:
        state_ = mean < shared_ ? State::kAlone : State::kShared;
        patience_ = std::max(patience_, seconds_ / kTrialShare);  // one pass may be long
        break;
      case State::kAlone:
      case State::kShared:
        patience_ = std::min(2.0 * patience_, kMostPatience);
        strikes_ = kStrikes - 1;
        state_ = State::kWatched;
        break;
    }
    products_ = seconds_ = 0.0;
  }

 private:
  static constexpr double kWindow = 0.04, kPatience = 0.4, kMostPatience = 3.2;  // seconds; time slices take 3 ms
  static constexpr double kDisturbed = 2.0;   // times as long as the fastest pass; on a quiet machine windows are below
  static constexpr double kTrialShare = 0.1;  // the most of the time, from one trial to the next, that a trial takes
  static constexpr int kStrikes = 3;          // disturbed windows, one after the other, before one thread is tried

  // kWatched: on all threads, and fast so far. kTrial: a window on one. kAlone, kShared: what was quicker, on one
  // thread or on all, until the patience ends.
  enum class State { kWatched, kTrial, kAlone, kShared } state_ = State::kWatched;
  double products_ = 0.0, seconds_ = 0.0;                                    // of the passes since the state began
  double fastest_ = std::numeric_limits<double>::infinity(), shared_ = 0.0;  // seconds a multiplication
  double patience_ = kPatience;
  int strikes_ = 0;
};

}  // namespace tipl
