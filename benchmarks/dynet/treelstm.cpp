// The TreeLSTM of tests/compiler/batched_models.py in DyNet's C++ API.
//
// treelstm HIDDEN WORDS TREES: TREES is a file with batches, each a line with the number of trees, then a line a tree in
// postfix form, a word's number for a leaf, -1 for an inner node. Every line "STRATEGY TRAIN" on standard input builds and
// runs the graph of the next batch with that strategy of automatic batching, with the backward if TRAIN is 1; the answer is
// "RAN", the seconds and the sum of all scores. All parameters are 0.01.
#include <dynet/dynet.h>
#include <dynet/expr.h>
#include <dynet/globals.h>
#include <dynet/model.h>
#include <dynet/init.h>
#include <dynet/param-init.h>
#include <dynet/training.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <vector>

using namespace dynet;

struct Weights {
  ParameterCollection all;
  LookupParameter words;
  Parameter leaf_w, leaf_b, left_w, left_b, right_w, out_w, out_b;
  unsigned h;
  Weights(unsigned hidden, unsigned vocabulary) : h(hidden) {
    ParameterInitConst init(0.01f);
    words = all.add_lookup_parameters(vocabulary, {h}, init);
    leaf_w = all.add_parameters({3 * h, h}, init);
    leaf_b = all.add_parameters({3 * h}, init);
    left_w = all.add_parameters({5 * h, h}, init);
    left_b = all.add_parameters({5 * h}, init);
    right_w = all.add_parameters({5 * h, h}, init);
    out_w = all.add_parameters({5, h}, init);
    out_b = all.add_parameters({5}, init);
  }
};

using Pair = std::pair<Expression, Expression>;  // state, memory

struct Graph {
  ComputationGraph cg;
  Expression leaf_w, leaf_b, left_w, left_b, right_w, out_w, out_b;
  Weights& m;
  explicit Graph(Weights& m) : m(m) {
    leaf_w = parameter(cg, m.leaf_w);
    leaf_b = parameter(cg, m.leaf_b);
    left_w = parameter(cg, m.left_w);
    left_b = parameter(cg, m.left_b);
    right_w = parameter(cg, m.right_w);
    out_w = parameter(cg, m.out_w);
    out_b = parameter(cg, m.out_b);
  }
  Expression tree(const std::vector<int>& postfix) {
    std::vector<Pair> stack;
    const unsigned h = m.h;
    for (int word : postfix) {
      if (word >= 0) {
        Expression x = lookup(cg, m.words, word);
        Expression g = affine_transform({leaf_b, leaf_w, x});
        Expression i = logistic(pick_range(g, 0, h)), o = logistic(pick_range(g, h, 2 * h)), u = tanh(pick_range(g, 2 * h, 3 * h));
        Expression c = cmult(i, u);
        stack.emplace_back(cmult(o, tanh(c)), c);
      } else {
        const Pair r = stack.back();
        stack.pop_back();
        const Pair l = stack.back();
        stack.pop_back();
        Expression g = affine_transform({left_b, left_w, l.first, right_w, r.first});
        Expression i = logistic(pick_range(g, 0, h)), fl = logistic(pick_range(g, h, 2 * h)), fr = logistic(pick_range(g, 2 * h, 3 * h));
        Expression o = logistic(pick_range(g, 3 * h, 4 * h)), u = tanh(pick_range(g, 4 * h, 5 * h));
        Expression c = cmult(i, u) + cmult(fl, l.second) + cmult(fr, r.second);
        stack.emplace_back(cmult(o, tanh(c)), c);
      }
    }
    return affine_transform({out_b, out_w, stack.back().first});
  }
};

int main(int argc, char** argv) {
  DynetParams params = extract_dynet_params(argc, argv);
  params.autobatch = 1;
  initialize(params);
  const unsigned hidden = std::atoi(argv[1]), words = std::atoi(argv[2]);
  std::vector<std::vector<std::vector<int>>> batches;
  std::ifstream file(argv[3]);
  std::string line;
  while (std::getline(file, line)) {
    batches.emplace_back(std::atoi(line.c_str()));
    for (auto& tree : batches.back()) {
      std::getline(file, line);
      std::istringstream numbers(line);
      for (int n; numbers >> n;) tree.push_back(n);
    }
  }
  Weights model(hidden, words);
  size_t next = 0;
  int strategy, train;
  while (std::cin >> strategy >> train) {
    autobatch_flag = strategy;
    const auto& batch = batches[next++ % batches.size()];
    const auto start = std::chrono::steady_clock::now();
    Graph graph(model);
    std::vector<Expression> scores;
    for (const auto& tree : batch) scores.push_back(graph.tree(tree));
    Expression total = sum_elems(sum(scores));
    const float value = as_scalar(graph.cg.forward(total));
    if (train) {
      graph.cg.backward(total);
      model.all.reset_gradient();
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("RAN %.9f %.9g\n", seconds, value);
    std::fflush(stdout);
  }
}
