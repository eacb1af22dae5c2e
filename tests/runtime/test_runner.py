"""The native runner under the address and undefined-behaviour sanitizers, in a process of its own."""

import subprocess

import pytest
from plait.runtime import native, sizes

MAIN = r"""
#include "runner.cpp"
#include <climits>
#include <cstdio>
#include <vector>

static void kernel(void* const* bufs, const int64_t* sizes, int nthreads) {
  auto x = static_cast<const float*>(bufs[0]);
  auto y = static_cast<float*>(bufs[1]);
  for (int64_t i = 0; i < sizes[0]; ++i) y[i] = x[i] * float(sizes[1] + nthreads);
}

static int64_t run(std::vector<int64_t> program, std::vector<char*> bases, std::vector<int64_t>& slots, int64_t* times) {
  return plait_run(program.data(), bases.data(), slots.data(), 3, times);  // vectors of exact size: any overrun is seen
}

int main() {
  const int64_t extremes[] = {INT64_MIN, INT64_MIN + 1, -3, -1, 0, 1, 2, 63, 64, INT64_MAX - 1, INT64_MAX};
  long long sum = 0;
  for (int64_t code = 0; code <= LAST_CODE + 1; ++code)
    for (int64_t a : extremes)
      for (int64_t b : extremes) {
        std::vector<int64_t> slots{a, b, 0};
        int64_t status = run({EVAL, code, 2, 0, 1, END}, {}, slots, nullptr);
        if (code > LAST_CODE && status != BAD_PROGRAM) return 1;
        sum += status;
      }
  std::vector<float> x(5, 2.0f), y(8, 0.0f);
  std::vector<int64_t> slots{5, 4, 12, 0, 1}, times(2, -1);
  auto f = reinterpret_cast<int64_t>(&kernel);
  std::vector<char*> bases{reinterpret_cast<char*>(x.data()), reinterpret_cast<char*>(y.data())};
  std::vector<int64_t> program{LAUNCH, f, 2, 2, 0, 3, 1, 2, 0, 1, GUARD, 4, 9, LAUNCH, f, 2, 2, 0, 3, 1, 3, 4, 1, END};
  if (run(program, bases, slots, times.data()) != 0 || times[0] < 0 || times[1] < 0) return 2;
  if (y[0] != 14 || y[1] != 0 || y[2] != 0 || y[3] != 14 || y[7] != 14) return 3;
  if (run({GUARD, 3, 9, END}, {}, slots, nullptr) != 10) return 4;
  std::puts(sum < 0 ? "right" : "no error was found");
}
"""


def test_under_sanitizers(tmp_path):
    source = MAIN.replace("LAST_CODE", str(len(sizes.OPS) - 1))
    (tmp_path / "main.cpp").write_text(source)
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        f"-I{native.SOURCE.parent}",
    ]
    command = [native.find_compiler(), *flags, str(tmp_path / "main.cpp"), "-o", str(tmp_path / "main")]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find -lasan" in built.stderr or "cannot find -lubsan" in built.stderr:
        pytest.skip("this compiler comes without sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "right"), done.stderr


def test_instruction_codes_agree_with_the_table():
    text = native.SOURCE.read_text()
    names = text[text.index("enum Code") :].split("{")[1].split("}")[0]
    assert [n.strip().lower() for n in names.split(",")] == list(sizes.OPS)
