"""The models of tests/compiler/batched_models.py in DyNet's Python API; runs in an environment of its own.

python models.py NAME HIDDEN STRATEGY WEIGHTS BATCHES [PROFILE]

WEIGHTS is an .npz of the torch model's parameters, BATCHES a JSON file with a list of batches of instances. Every line on
standard input builds and runs the next batch with that strategy of automatic batching: "0" forward, "1" with the backward,
"2" forward in lock step, written by hand so that all instances take a step together where they ask for values. The answer is
a line "RAN" with the seconds and the sum of all results. With PROFILE, DyNet prints every batch of nodes that it runs.
"""

import json
import sys
import time

import dynet_config

PROFILE = len(sys.argv) > 6
dynet_config.set(mem=2000, autobatch=int(sys.argv[3]), profiling=2 if PROFILE else 0)

import dynet as dy  # noqa: E402
import numpy as np  # noqa: E402


class Model:
    def __init__(self, weights, hidden):
        self.all = dy.ParameterCollection()
        self.h = hidden
        self.p = {}
        for name, array in weights.items():
            if name in ("embedding.weight", "vectors.weight"):
                self.p[name] = self.all.lookup_parameters_from_numpy(array)
            elif name == "matrices":  # DyNet swaps the first axis and the last
                self.p[name] = self.all.lookup_parameters_from_numpy(np.ascontiguousarray(array.transpose(0, 2, 1)))
            else:
                self.p[name] = self.all.parameters_from_numpy(array)

    def linear(self, name, x):
        b = self.p.get(name + ".bias")
        w = self.p[name + ".weight"]
        return dy.affine_transform([b, w, x]) if b is not None else w * x


def parts(x, n, h):
    return [dy.pick_range(x, i * h, (i + 1) * h) for i in range(n)]


class TreeLSTM(Model):
    def visit(self, t):
        h = self.h
        if not isinstance(t, list):
            x = dy.lookup(self.p["embedding.weight"], t)
            i, o, u = parts(self.linear("leaf", x), 3, h)
            c = dy.cmult(dy.logistic(i), dy.tanh(u))
            return dy.cmult(dy.logistic(o), dy.tanh(c)), c
        hl, cl = self.visit(t[0])
        hr, cr = self.visit(t[1])
        g = dy.affine_transform([self.p["left.bias"], self.p["left.weight"], hl, self.p["right.weight"], hr])
        i, fl, fr, o, u = parts(g, 5, h)
        c = dy.cmult(dy.logistic(i), dy.tanh(u)) + dy.cmult(dy.logistic(fl), cl) + dy.cmult(dy.logistic(fr), cr)
        return dy.cmult(dy.logistic(o), dy.tanh(c)), c

    def run(self, t):
        return [self.linear("out", self.visit(t)[0])]


class MVRNN(Model):
    def visit(self, t):
        if not isinstance(t, list):
            return dy.lookup(self.p["vectors.weight"], t), dy.lookup(self.p["matrices"], t)
        a, am = self.visit(t[0])
        b, bm = self.visit(t[1])
        p = dy.tanh(self.linear("w", dy.concatenate([bm * a, am * b])))
        pm = dy.transpose(dy.transpose(dy.concatenate([am, bm])) * dy.transpose(self.p["wm.weight"]))
        return p, pm

    def run(self, t):
        return [self.linear("out", self.visit(t)[0])]


class BiRNN(Model):
    def cell(self, name, x, h):
        p = self.p
        g = dy.affine_transform([p[name + ".bias_ih"], p[name + ".weight_ih"], x, p[name + ".weight_hh"], h])
        return dy.tanh(g + p[name + ".bias_hh"])

    def read(self, name, xs):
        h, states = dy.zeros(self.h), []
        for x in xs:
            h = self.cell(name, x, h)
            states.append(h)
        return states

    def run(self, words):
        xs = [dy.inputVector(w) for w in words]
        there, back = self.read("there", xs), self.read("back", xs[::-1])[::-1]
        return [self.linear("out", dy.concatenate([a, b])) for a, b in zip(there, back, strict=True)]


class NestedRNN(BiRNN):
    def gru(self, name, x, h):
        p, n = self.p, self.h
        gx = dy.affine_transform([p[name + ".bias_ih"], p[name + ".weight_ih"], x])
        gh = dy.affine_transform([p[name + ".bias_hh"], p[name + ".weight_hh"], h])
        rx, zx, nx = parts(gx, 3, n)
        rh, zh, nh = parts(gh, 3, n)
        r, z = dy.logistic(rx + rh), dy.logistic(zx + zh)
        new = dy.tanh(nx + dy.cmult(r, nh))
        return new + dy.cmult(h - new, z)

    def run(self, instance):
        vector, steps = instance
        x, state = dy.inputVector(vector), dy.parameter(self.p["start"])
        for n in steps:
            h = state
            for _ in range(n):
                h = self.cell("inner", x, h)
            state = self.gru("outer", h, state)
        return [state]


class DRNN(Model):
    DEPTH = 5

    def grow(self, h, depth, found):
        found.append(self.linear("label", h))
        if depth == 0 or dy.sum_elems(self.linear("stop", h)).value() > 0.2:
            return
        left, right = parts(dy.tanh(self.linear("down", h)), 2, self.h)
        self.grow(left, depth - 1, found)
        self.grow(right, depth - 1, found)

    def run(self, vector):
        found = []
        self.grow(dy.inputVector(vector), self.DEPTH, found)
        return found

    def lockstep(self, vectors):
        level, found = [dy.inputVector(v) for v in vectors], []
        for depth in range(self.DEPTH, -1, -1):
            found += [self.linear("label", h) for h in level]
            if depth == 0 or not level:
                break
            stops = [dy.sum_elems(self.linear("stop", h)) for h in level]
            dy.forward(stops)
            grown = [dy.tanh(self.linear("down", h)) for h, s in zip(level, stops, strict=True) if not s.value() > 0.2]
            level = [part for g in grown for part in parts(g, 2, self.h)]
        return found


class StackRNN(NestedRNN):
    def begin(self, words):
        return {
            "buffer": [dy.lookup(self.p["embedding.weight"], w) for w in reversed(words)],
            "stack": [],
            "state": dy.zeros(self.h),
        }

    def step(self, s, shift):
        if not s["buffer"] or (len(s["stack"]) > 1 and not shift):
            right, left = s["stack"].pop(), s["stack"].pop()
            s["stack"].append(dy.tanh(self.linear("compose", dy.concatenate([left, right]))))
        else:
            s["stack"].append(s["buffer"].pop())
        s["state"] = self.gru("state", s["stack"][-1], s["state"])

    def run(self, words):
        s = self.begin(words)
        while s["buffer"] or len(s["stack"]) > 1:
            self.step(s, int(np.argmax(self.linear("action", s["state"]).npvalue())) == 0)
        return [s["stack"][0] + s["state"]]

    def lockstep(self, instances):
        everyone = [self.begin(words) for words in instances]
        going = everyone
        while going := [s for s in going if s["buffer"] or len(s["stack"]) > 1]:
            scores = [self.linear("action", s["state"]) for s in going]
            dy.forward(scores)
            for s, score in zip(going, scores, strict=True):
                self.step(s, int(np.argmax(score.npvalue())) == 0)
        return [s["stack"][0] + s["state"] for s in everyone]


MODELS = {
    "TreeLSTM": TreeLSTM, "MV-RNN": MVRNN, "BiRNN": BiRNN, "NestedRNN": NestedRNN, "DRNN": DRNN, "StackRNN": StackRNN,
}  # fmt: skip


def main():
    name, hidden, _, weights, batches = sys.argv[1:6]
    model = MODELS[name](dict(np.load(weights)), int(hidden))
    with open(batches) as file:
        todo = json.load(file)
    for at, line in enumerate(sys.stdin):
        how, batch = int(line), todo[at % len(todo)]
        started = time.perf_counter()
        dy.renew_cg()
        results = model.lockstep(batch) if how == 2 else [r for instance in batch for r in model.run(instance)]
        total = dy.sum_elems(dy.esum(results))
        value = total.value()
        if how == 1:
            total.backward()
        print(f"RAN {time.perf_counter() - started:.9f} {value:.9g}", flush=True)


main()
