"""The catalogue of errors: one class per mistake, each with a stable code, a message in the user's words and a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar


class PlaitError(Exception):
    """Base of all plait errors.

    `code` is stable; `message` is formatted with the keyword arguments; `fix` says the way out.
    """

    code: ClassVar[str] = "P0000"
    message: ClassVar[str] = "{detail}"
    fix: ClassVar[str] = ""

    def __init__(self, *, source: str | None = None, **fields: object) -> None:
        self.fields = fields
        self.source = source
        text = f"[{self.code}] " + self.message.format(source=source, **fields)
        if source:
            text += f"\n  at {source}"
        if self.fix:
            text += f"\n  way out: {self.fix.format(**fields)}"
        super().__init__(text)

    def __reduce__(self) -> tuple[Callable[..., PlaitError], tuple[object, ...]]:
        return _revived, (type(self), self.args, self.__dict__)

    def add(self, *lines: str) -> None:
        """Append lines to the message."""
        self.args = ("\n".join([str(self), *(f"  {line}" for line in lines)]),)


def _revived(cls: type[PlaitError], args: tuple[object, ...], state: dict[str, object]) -> PlaitError:
    """An error that was pickled, as between processes."""
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


def catalogue() -> tuple[type[PlaitError], ...]:
    """Every error class, ordered by code."""
    found: list[type[PlaitError]] = []
    todo = [PlaitError]
    while todo:
        for sub in todo.pop().__subclasses__():
            found.append(sub)
            todo.append(sub)
    return tuple(sorted(found, key=lambda c: c.code))


class UnknownOp(PlaitError):
    """A graph's text or a pass names an op that neither torch nor plait knows.

    Happens when a text dump is edited by hand or comes from a newer torch.
    """

    code = "P0101"
    message = "there is no op called {name!r}"
    fix = "check the spelling (namespace.name.overload); custom ops must be imported before the graph is parsed"


class InferenceFailed(PlaitError):
    """An op refuses the types of its arguments.

    Raised when a pass or a hand-edited text applies an op to shapes or dtypes that torch itself would refuse.
    """

    code = "P0102"
    message = "{op} cannot be applied to these types: {why}"
    fix = "correct the arguments; the types are printed beside each node"


class NeedsSizeFact(PlaitError):
    """The result type of an op depends on a fact about a size symbol that is not known.

    Passes must take the general path or ask for a guard instead of assuming.
    """

    code = "P0103"
    message = "the type of {op} depends on {fact}, which is not known for all sizes"
    fix = "make the dimension static, or choose a form of the op that holds for every size"


class BadText(PlaitError):
    """A graph's text form cannot be read.

    Raised for hand-edited or damaged text dumps; the message shows the line.
    """

    code = "P0104"
    message = "line {line}: {why}\n    {text}"
    fix = "the form is Python: `name = op(args)  # type`; see docs/ir.md"


class WrongInputCount(PlaitError):
    """A compiled model was called with too many or too few inputs."""

    code = "P0501"
    message = "this model takes {expected} inputs, got {got}"
    fix = "call it as it was captured; its inputs are: {names}"


class WrongInputType(PlaitError):
    """An input is not of the kind that the model was captured with (a tensor, an int, …)."""

    code = "P0502"
    message = "input {name!r} must be {expected}, got {got}"
    fix = "pass {expected}, or compile again with an example of the new kind"


class WrongInputDtype(PlaitError):
    """An input tensor has another dtype than the kernels were generated for."""

    code = "P0503"
    message = "input {name!r} must be of dtype {expected}, got {got}"
    fix = "convert it with .to(torch.{expected}), or compile for {got}"


class WrongInputDevice(PlaitError):
    """An input tensor lies on another device than the one the plan was compiled for."""

    code = "P0504"
    message = "input {name!r} must be on device {expected}, got {got}"
    fix = "move it with .to({expected!r}), load the artifact with device={got!r}, or compile for {got}"


class WrongInputRank(PlaitError):
    """An input tensor has too many or too few dimensions."""

    code = "P0505"
    message = "input {name!r} must have {expected} dimensions, got {got} (shape {shape})"
    fix = "reshape it; the expected shape is {spec}"


class WrongInputShape(PlaitError):
    """A dimension of an input has a size that the plan does not allow."""

    code = "P0506"
    message = "dimension {dim} of input {name!r} must be {expected}, got {got} (shape {shape})"
    fix = "pass a tensor of shape {spec}, or compile with that dimension dynamic"


class WrongInputStrides(PlaitError):
    """An input has the right shape but another memory layout than the kernels were generated for."""

    code = "P0507"
    message = "dimension {dim} of input {name!r} must have stride {expected}, got {got} (strides {strides})"
    fix = "lay it out as at compilation, for example with .contiguous()"


class WrongInputValue(PlaitError):
    """A number that was fixed at compilation has another value, or a size is out of the range it was compiled for."""

    code = "P0508"
    message = "{name!r} must be {expected}, got {got}"
    fix = "pass that value, or compile again with the number dynamic or its range wider"


class SizeFailed(PlaitError):
    """A size expression divides by zero or leaves the range of 64-bit integers."""

    code = "P0509"
    message = "a size of the plan cannot be computed: {why}"
    fix = "check the sizes of the inputs; they are probably far outside what the model was captured for"


class GuardFailed(PlaitError):
    """A run-time assertion of the captured program does not hold for these inputs."""

    code = "P0510"
    message = "an assertion of the model failed: {message}"
    fix = "the inputs break an assumption of the program; change them, or capture it without that assumption"


class OpNotAvailable(PlaitError):
    """A plan calls a torch op that this process does not have."""

    code = "P0511"
    message = "the plan calls {op!r}, which this torch ({torch}) does not know"
    fix = "import the package that registers the op, or compile again with this version of torch"


class KernelMissing(PlaitError):
    """A plan launches a kernel, or names a weight or region, that was not handed to the executor."""

    code = "P0512"
    message = "the plan needs the {kind} {name!r}, which was not given"
    fix = "pass every {kind} that the plan names; the artifact or the cache entry may be incomplete"


class UnsafePlan(PlaitError):
    """The static checker found a plan that reads unwritten memory, overlaps live buffers or names what does not exist."""

    code = "P0513"
    message = "the plan is not safe to run: {why}"
    fix = "this is a mistake of the compiler or a hand-edited plan; please report it with the plan's JSON"


class WrongOpResult(PlaitError):
    """A library op returned another number of results, or another shape, than the plan was compiled for."""

    code = "P0514"
    message = "{op} returned {got}, the plan expects {expected}"
    fix = "this torch computes the op differently from the one that compiled the plan; compile again with this version"


class DamagedArtifact(PlaitError):
    """An artifact's content does not match its manifest, or cannot be read."""

    code = "P0520"
    message = "the artifact is damaged: {part}: {why}"
    fix = "copy or build the file again; nothing of it was run"


class NotAnArtifact(PlaitError):
    """The file given to `plait.load` was not written by plait."""

    code = "P0521"
    message = "{path} is not a plait artifact: {why}"
    fix = "pass a file written by `plait compile` or CompiledModel.save"


class ArtifactVersion(PlaitError):
    """An artifact was written in a format that this version of plait does not read."""

    code = "P0522"
    message = "the artifact has format version {got}, this plait reads version {expected}"
    fix = "install a matching plait, or compile the model again"


class NoBinaryFits(PlaitError):
    """No kernel binary of the artifact runs on this machine and it could not be rebuilt."""

    code = "P0523"
    message = "the artifact has kernels for {have}, this machine is {machine}, and they cannot be rebuilt here: {why}"
    fix = "compile for this target, or install a C++ compiler (g++ or clang++, or set CXX)"


class KernelBuildFailed(PlaitError):
    """The C++ compiler refused a kernel's source."""

    code = "P0524"
    message = "{compiler} failed:\n{output}"
    fix = "check the compiler's version; the command was: {command}"


class InvalidGraph(PlaitError):
    """A graph breaks an invariant of its level.

    Raised by the verifier, after a pass or for a hand-written graph. The message shows the nodes around the culprit.
    """

    code = "P0105"
    message = "graph {graph} is invalid{where}: {why}\n{context}"
    fix = "if a pass is named, this is a bug of that pass: disable it with disable_passes and report it"


class CannotImport(PlaitError):
    """A captured graph holds something that plait's IR has no form for."""

    code = "P0106"
    message = "cannot import {what}: {why}"
    fix = "under torch.compile, graph breaks around it keep the rest compiled (fullgraph=False)"


class NoFixpoint(PlaitError):
    """Rewrite rules of one pass keep undoing each other."""

    code = "P0107"
    message = "rule {rule} still fires after {rounds} sweeps"
    fix = "two rules of the pass contradict each other; disable the pass and report it"


class InvalidKernel(PlaitError):
    """A kernel's tree breaks a rule of kernel IR, so that no printer can give it a meaning."""

    code = "P0301"
    message = "kernel {kernel} is invalid: {why}"
    fix = "this is a bug of the lowering that built it; report it with the kernel's origin"


class IndexNotPrintable(PlaitError):
    """An index expression holds a function that is not integer arithmetic."""

    code = "P0302"
    message = "cannot print index {expr}: {what} is not integer arithmetic"
    fix = "write the index with +, *, FloorDiv, Mod, ModularIndexing, Min and Max"


class NoCompiler(PlaitError):
    """There is no C++ compiler to build kernels with."""

    code = "P0303"
    message = "no C++ compiler found: tried {tried}"
    fix = "install g++ 11 or newer, or set CXX to its path"


class UnknownPass(PlaitError):
    """A pipeline, an option or the command line names a pass that does not exist."""

    code = "P0201"
    message = "there is no pass called {name!r}; near names: {near}"
    fix = "`plait passes` lists all passes with their options"


class UnknownPassOption(PlaitError):
    """A pass was given an option that it does not have."""

    code = "P0202"
    message = "pass {name} has no option {option!r}; it has: {known}"
    fix = "`plait passes` lists all passes with their options"


class BadPassOption(PlaitError):
    """An option of a pass has a value of the wrong kind."""

    code = "P0203"
    message = "option {option!r} of pass {name} must be {expected}, not {value!r}"
    fix = "give a value of that kind; `plait passes` lists all options"


class MissingPassOption(PlaitError):
    """A pass has an option without a default, and it was not given."""

    code = "P0204"
    message = "pass {name} needs the option {option!r} ({expected}): {doc}"
    fix = "give it: {name}:{option}=..."


class PassFailed(PlaitError):
    """A pass raised an error or left an invalid graph.

    The error's `fields["before"]` holds the text of the graph that the pass was given, so that it can be run again.
    """

    code = "P0205"
    message = "pass {name}{rule} failed: {why}{context}"
    fix = "disable the pass with disable_passes, and report it with the graph's text"


class MissingFact(PlaitError):
    """A pass needs something to hold that no earlier pass of the pipeline has established."""

    code = "P0206"
    message = "pass {name} requires {fact!r}, which does not hold here (holding: {held})"
    fix = "run {makers} before it"


class WrongCapturePoint(PlaitError):
    """A pass runs at another capture point than the graph comes from."""

    code = "P0207"
    message = "pass {name} works on {at} graphs, this one is a {here} graph"
    fix = "put the pass into the {at} pipeline"


class InvalidMatmul(PlaitError):
    """A matmul template was asked for a combination that it does not have."""

    code = "P0330"
    message = "no matmul kernel {name}: {why}"
    fix = "use a library call for this product, or change what is named"


class SizeNotSupported(PlaitError):
    """A size expression has no form that the runtime can compute with integers.

    Happens for fractional powers or real-valued expressions of sizes.
    """

    code = "P0310"
    message = "the size {expr} cannot be computed at run time"
    fix = "make the dimension static, or compute the size outside the compiled function"


class CannotLower(PlaitError):
    """A node can neither be generated nor handed to torch."""

    code = "P0311"
    message = "cannot lower {what}: {why}"
    fix = "keep this operation outside the compiled function"


class UnknownSetting(PlaitError):
    """`plait.config` was given a name that it does not have."""

    code = "P0601"
    message = "there is no setting {name!r}, did you mean {near!r}?"
    fix = "the settings are: {known}"


class BadSetting(PlaitError):
    """A setting or its environment variable has a value of the wrong kind."""

    code = "P0602"
    message = "{name} must be {expected}, not {value!r}"
    fix = "correct or unset it"


class UnknownMode(PlaitError):
    """`torch.compile(mode=...)` names a mode that plait does not have."""

    code = "P0401"
    message = "there is no mode {mode!r}"
    fix = "the modes are: {known}"


class UnknownOption(PlaitError):
    """`options` has a key that plait does not know."""

    code = "P0402"
    message = "there is no option {name!r}, did you mean {near!r}?"
    fix = "the options are: {known}; an option of a pass is written pass.option"


class BadOption(PlaitError):
    """An option has a value of the wrong kind."""

    code = "P0403"
    message = "option {name!r} must be {expected}, not {value!r}"
    fix = "give a value of that kind"


class FallbackRefused(PlaitError):
    """With `fallback="error"`, something in the program has no generated kernel and no library call chosen by plait."""

    code = "P0404"
    message = "{what} would run in torch: {why}"
    fix = 'allow it with options={{"fallback": "allow"}}; the coverage table lists everything that falls back'


class TrainingMode(PlaitError):
    """A module in training mode was given to `plait.compile`, and an op of it behaves differently then."""

    code = "P0405"
    message = "the module is in training mode, where {op} behaves differently"
    fix = (
        "call model.eval() first, or keep that behaviour with options={{'training': True}}; "
        'to train, use torch.compile(model, backend="plait")'
    )


class CannotExport(PlaitError):
    """torch.export refuses the model."""

    code = "P0406"
    message = "torch.export cannot capture {what}: {why}"
    fix = 'change the model as torch.export says, or use torch.compile(model, backend="plait"), which tolerates graph breaks'


class InterfaceChanged(PlaitError):
    """The passes of a pipeline changed what the graph takes or gives back."""

    code = "P0407"
    message = "the {pipeline} pipeline changed {what} of graph {graph} from {before} to {after}"
    fix = "this is a mistake of one of its passes: {passes}; find it with verify='each-pass' or disable_passes"


class NotANumber(PlaitError):
    """Numerics cannot be judged where inputs hold NaN, or results nothing else."""

    code = "P0408"
    message = "results cannot be compared: {what} (inputs with NaN or infinity: {name})"
    fix = "give example inputs on which the model computes finite numbers"


class UnknownStep(PlaitError):
    """The history of a compilation has no such pass."""

    code = "P0409"
    message = "no step {name!r} in the history"
    fix = "the steps are: {known}"


class NoMinimax(PlaitError):
    """No minimax polynomial was found for a function on an interval."""

    code = "P0304"
    message = "no minimax fit of {what}: {why}"
    fix = "keep poles and kinks out of the interval, lower the degree or raise `precision`"


class BadSource(PlaitError):
    """The command line was given a SRC that names no model.

    SRC is `file.pt2`, `file.plait` or `package.module:factory`; the factory takes no arguments and returns a module, or a
    tuple of module, example inputs and (optionally) dynamic shapes.
    """

    code = "P0701"
    message = "{src!r} is no model: {why}"
    fix = "give file.pt2, file.plait or package.module:factory; `plait compile --help` shows examples"


class BadShape(PlaitError):
    """A `--shape` or `--dynamic` of the command line cannot be read, or names an input that the model does not have."""

    code = "P0702"
    message = "{option} {value!r}: {why}"
    fix = "write name=1x3x224 or tokens=2x16:int64, and for --dynamic name:0, name:0=2..512 or name:0=batch:1..64"


class BadTarget(PlaitError):
    """`--target` names a machine that plait does not compile for."""

    code = "P0703"
    message = "there is no target {target!r}: {why}"
    fix = "targets are cpu (all of {isas}), cpu:{isas} and cuda:80, cuda:90 and so on, separated by commas"


class BadInputs(PlaitError):
    """Inputs for `plait run` cannot be read, or do not fit the artifact."""

    code = "P0704"
    message = "cannot use {path} as inputs: {why}"
    fix = "give one .npy for each input in order, or one .safetensors with their names: {names}"


class NoCacheEntry(PlaitError):
    """`plait cache explain` was given a prefix that no entry, or more than one, has."""

    code = "P0705"
    message = "{count} cache entries start with {prefix!r}"
    fix = "`plait cache ls` lists all entries"


class MissingPackage(PlaitError):
    """A command needs a package that is not installed."""

    code = "P0706"
    message = "{what} needs the package {package}"
    fix = "{how}"


class UnknownPeer(PlaitError):
    """A comparison was asked for with something that plait does not know how to run."""

    code = "P0708"
    message = "there is no peer called {name!r}"
    fix = "there are: {known}"


class PeerRefused(PlaitError):
    """A peer of a comparison, OpenVINO for example, could not compile the model."""

    code = "P0709"
    message = "{peer} does not take this model: {why}"
    fix = "leave it out of --peer, or look for this message in its own issue tracker"


class CannotProfile(PlaitError):
    """The steps of a plan were to be timed on a device where a launch returns before it has run."""

    code = "P0414"
    message = "plans for {device} cannot be profiled step by step: a launch returns before its kernel has run"
    fix = "compile and profile the model on the CPU, or use torch.profiler, which shows the kernels by name"


class InterpretationFailed(PlaitError):
    """A printed Triton kernel raised in Triton's interpreter, or touched memory outside its buffers."""

    code = "P0341"
    message = "interpreting kernel {kernel} failed: {why}\n{details}"
    fix = "this is a bug of the printer or of the lowering that built the kernel; report it with the kernel's text"


class InterpretationTimedOut(PlaitError):
    """A printed Triton kernel ran too long in Triton's interpreter, which is thousands of times slower than a device."""

    code = "P0342"
    message = "interpreting kernel {kernel} took more than {seconds} s"
    fix = "interpret with smaller sizes, or give the Interpreter a longer timeout"


class NoTriton(PlaitError):
    """Triton is not installed, or cannot compile in this process."""

    code = "P0343"
    message = "cannot compile Triton kernels: {why}"
    fix = "{how}"


class CrossCompilationFailed(PlaitError):
    """Triton refused a printed kernel for a target."""

    code = "P0344"
    message = "kernel {kernel} does not compile for {target}: {why}"
    fix = "if the tile sizes are yours, try smaller ones; otherwise report it with the kernel's text, {path}"


class UnknownTarget(PlaitError):
    """A device target is not one that kernels can be compiled for."""

    code = "P0345"
    message = "unknown target {target!r}"
    fix = "write cuda:SM (cuda:80, cuda:90) or hip:ARCHITECTURE (hip:gfx942)"


class NoCudaDriver(PlaitError):
    """A kernel for an NVIDIA GPU is to run, but this machine has no driver."""

    code = "P0541"
    message = "no CUDA driver: {why}"
    fix = "install the NVIDIA driver, or run the model's CPU plan"


class NoBinaryForDevice(PlaitError):
    """An artifact's kernels were not compiled for this GPU."""

    code = "P0542"
    message = "kernel {kernel} has no binary for {device} (compute capability {capability}); it has: {targets}"
    fix = "compile the artifact again with this GPU's target"


class CudaCallFailed(PlaitError):
    """The CUDA driver returned an error."""

    code = "P0543"
    message = "{call} of kernel {kernel} failed: {name} ({what})"
    fix = "if memory or launch resources ran out, use smaller sizes; otherwise report it with the kernel's name"


class MisalignedBuffer(PlaitError):
    """A kernel that was compiled for 16-byte aligned buffers, or for sizes that are multiples of 16, got others."""

    code = "P0544"
    message = "kernel {kernel} was compiled for {parameter} being a multiple of 16, got {value}"
    fix = "clone the tensor if it is a view, or compile the kernel also without this assumption"


class CannotCapture(PlaitError):
    """A program has no functional form before autograd, where passes that change what is computed must see it.

    Under torch.compile this is reported and the program is compiled without those passes.
    """

    code = "P0411"
    message = "the graph cannot be captured before autograd: {why}"
    fix = "passes at the forward capture point are left out for this graph; change that place of the model to have them"


class WrongInputStructure(PlaitError):
    """A compiled model was called with arguments nested in another way than at capture."""

    code = "P0412"
    message = "the arguments must have the structure {expected}, got {got}"
    fix = "call the model as it was captured"


class StructureNotPortable(PlaitError):
    """The arguments or results of a model are nested in containers that an artifact cannot describe, or whose class this
    process has not registered."""

    code = "P0525"
    message = "the structure of the {which} cannot be {verb}: {why}"
    fix = "use tuples, lists and dicts, or register the class with torch.utils._pytree on both sides"


class NoSuchPart(PlaitError):
    """An artifact was asked for a graph or kernel that it does not hold."""

    code = "P0707"
    message = "{path} holds no {what}"
    fix = "it holds: {known}"


class DamagedProfile(PlaitError):
    """A file of measured timings cannot be read."""

    code = "P0350"
    message = "the profile {path} is damaged: {why}"
    fix = "delete it; its timings are measured again when they are needed"


class ForeignProfile(PlaitError):
    """Timings of one kind of machine were to be merged into those of another."""

    code = "P0351"
    message = "the profile was measured on another kind of machine ({theirs}) than this one ({ours})"
    fix = "measure here, or merge it into a table of that kind of machine"


class NumericsBroken(PlaitError):
    """With `verify="each-pass"`, a pass changed results more than it promises.

    The error's `fields["step"]` is the pass with the graphs before and after it.
    """

    code = "P0413"
    message = "pass {name} changed {result}: {why}{where}\n{table}"
    fix = "this is a mistake of the pass: disable it with disable_passes and report it with a dump (dump_dir)"


class BetterPlanWrong(PlaitError):
    """A plan that was compiled in the background computes something else than the plan that runs, on the inputs of a call.

    It is logged as a warning and the calls go on with the plan that ran before; with `verify="each-pass"` it is raised.
    """

    code = "P0416"
    message = "a plan of {name} that was compiled in the background is wrong, {what}: {why}"
    fix = "this is a mistake of plait, report the bundle; calls go on with the plan that ran before"


class BackgroundLost(PlaitError):
    """A process forked while something was compiled in the background: the child has no thread that goes on with it."""

    code = "P0417"
    message = "{name} was being compiled in the background of another process"
    fix = "this process goes on with the plan that it has; fork after plait.wait(), or compile again here"


class CannotRetarget(PlaitError):
    """A graph that was captured on the CPU has an op that other devices do not have."""

    code = "P0346"
    message = "{op} cannot be compiled for {device}: {why}"
    fix = "leave the device's target out, capture the model on the device itself, or replace the op in the model"


class DeviceNotAvailable(PlaitError):
    """An artifact or a bundle is to run on a device that this process cannot use, or that it was not compiled for."""

    code = "P0545"
    message = "it cannot run on {device}: {why}"
    fix = 'load an artifact with device="cpu", or compile it with the target of this device; replay a bundle where it is'


class SharedMemory(PlaitError):
    """An input shares memory with another one that the model writes, or with a buffer that it writes."""

    code = "P0526"
    message = "input {name!r} shares memory with {other!r}, which the model writes"
    fix = "pass a copy (.clone()); a compiled model reads all its inputs before it writes any"


class NothingToFind(PlaitError):
    """A bisection, a search for a bad node or a reduction was asked for on a program that is right."""

    code = "P0611"
    message = "{name} gives the right results on these inputs: there is nothing to find"
    fix = "give the inputs on which it goes wrong, or a check of your own"


class WrongResults(PlaitError):
    """With `verify="each-pass"`, kernels compute something else than their graph's ops on the inputs of the first call."""

    code = "P0621"
    message = "the kernels of {name} compute a wrong {what}: {why}{where}"
    fix = "this is a mistake of plait: report the bundle; bisect_limit, or an op that is kept whole, works around it"


class UnknownRule(PlaitError):
    """The debugger was asked about a rule that no pass has tried so far."""

    code = "P0622"
    message = "no pass so far has tried a rule {name!r}{near}"
    fix = "step on to its pass ({ahead}); tried so far: {known}"


class UnknownNode(PlaitError):
    """The debugger was asked about a node or value that is in none of its graphs."""

    code = "P0623"
    message = "there is no node {name!r}: {why}"
    fix = "print dbg.graph: nodes go by the names on the left, such as {near}"


class NothingAhead(PlaitError):
    """The debugger was asked to run a pass that does not come any more."""

    code = "P0624"
    message = "no pass {name} is ahead"
    fix = "ahead are: {ahead}; what has run is in dbg.history"


class EditRefused(PlaitError):
    """A graph was edited in the debugger such that callers would have to call it differently."""

    code = "P0625"
    message = "the edit changes {what} of graph {graph} from {before} to {after}"
    fix = "keep shapes, dtypes and strides of inputs and outputs as they are"


class NoGraph(PlaitError):
    """What should have been a graph, or given one, is something else."""

    code = "P0626"
    message = "{what} must give a graph, not {got}"
    fix = "give the edited text of dbg.graph, or a function that takes the graph and returns another one"


class NotABundle(PlaitError):
    """The file given as a bundle of a failure was not written by plait."""

    code = "P0631"
    message = "{path} is not a bundle: {why}"
    fix = "pass a file written by `plait bundle`, `plait reduce -o`, or named in the message of a failure"


class BundleVersion(PlaitError):
    """A bundle was written in a format that this version of plait does not read."""

    code = "P0632"
    message = "the bundle has format version {got}, this plait reads version {expected}"
    fix = "install the plait that its bundle.json names, or write it again"


class DamagedBundle(PlaitError):
    """A part of a bundle is missing, altered or ill-formed."""

    code = "P0633"
    message = "the bundle is damaged in {part}: {why}"
    fix = "copy it again from where it was written, or write it again"


class PassNotFound(PlaitError):
    """A pass that a bundle or a command line names by its place cannot be imported here."""

    code = "P0634"
    message = "the pass {path} cannot be imported: {why}"
    fix = "run where its module can be imported (the current folder is searched), or install the package that holds it"


class CannotBundle(PlaitError):
    """A failing program has something about it that a bundle cannot hold."""

    code = "P0635"
    message = "{what} cannot be written into a bundle: {why}"
    fix = "reproduce the failure without it, or report the failure with your own program"


class BadCheck(PlaitError):
    """The command that is to judge candidates cannot be run."""

    code = "P0641"
    message = "the check {command!r} cannot be run: {why}"
    fix = 'write a command that exits with 0 for a good artifact, such as --check "python judge.py {{}}"'


class AnotherFailure(PlaitError):
    """A program that is to be reduced fails, but not as it is said to."""

    code = "P0642"
    message = "{name} fails otherwise than it did: {found}; it was: {expected}"
    fix = "reduce it for the failure that it has now, or go back to the version of plait that the bundle names"


class ProcessDied(PlaitError):
    """A process that judged a candidate of a bisection died."""

    code = "P0643"
    message = "a process that was to judge a candidate died: {how}"
    fix = "reduce the program first, which looks at each candidate in a process of its own, and bisect what is left"


class DataDependentShape(PlaitError):
    """An op inside of an instance gives a tensor whose shape depends on data, so that instances cannot be stacked."""

    code = "P0801"
    message = "the shape of what {op} gives depends on data ({why}), so instances cannot run as one batch"
    fix = "use a form with a fixed shape, such as a mask, or compute it outside of the batched program"


class SharedWrite(PlaitError):
    """An instance writes in place to a tensor that other instances, or the caller, see as well."""

    code = "P0802"
    message = "{op} writes in place to {what}, which others see"
    fix = "write to a clone of it, or return the new value and store it after the batched call"


class WriteThroughView(PlaitError):
    """An instance writes in place to a tensor that shares memory with another one."""

    code = "P0803"
    message = (
        "{op} writes in place to a tensor that shares memory with another one, and batched values have memory of their own"
    )
    fix = "write to a clone, or use the form of the op that gives a new tensor"


class BatchDiffers(PlaitError):
    """An instance that was run alone, because `verify` asks for it, gave another answer than in the batch."""

    code = "P0804"
    message = "instance {number} gives another answer alone than in the batch: {why}"
    fix = "report it with the program; until then compare with compile_after=None, which runs blocks in torch"


class RegionNotBatched(PlaitError):
    """A captured graph has a region that cannot run for some instances only."""

    code = "P0805"
    message = "the region {region} cannot be batched: {why}"
    fix = "give plait.autobatch the Python program instead of the captured graph"


class UnknownSwitch(PlaitError):
    """`plait.autobatch` was told to leave out an optimisation that it does not have."""

    code = "P0806"
    message = "autobatch has no optimisation called {name!r}"
    fix = "there are: {known}"


class AutocastNotBatched(PlaitError):
    """`torch.autocast` is on where a batched program is called, or within it."""

    code = "P0807"
    message = "autocast is on{where}, which batched programs do not take part in"
    fix = "convert the model and its inputs to the dtype that is wanted, or leave autocast around the batched call"


class TensorNotBatched(PlaitError):
    """An instance brings a tensor that cannot be a row of others."""

    code = "P0808"
    message = "a tensor of {what} cannot be batched with those of other instances"
    fix = "give it as an ordinary dense tensor, for example `x.as_subclass(torch.Tensor)` or `x.to_dense()`"


class BadQuantizedType(PlaitError):
    """A quantized weight was asked for in a format that does not exist, or its parts are not those of its type."""

    code = "P0901"
    message = "no quantized weight of {what}: {why}"
    fix = "types are described in plait.formats.QuantizedType and docs/quantize.md"


class GroupDoesNotDivide(PlaitError):
    """The columns of a weight cannot be cut into groups of that size."""

    code = "P0902"
    message = "groups of {group} do not divide {columns} columns"
    fix = "take a group size that does, such as {near}"


class BadCalibration(PlaitError):
    """The batches that a model is to be calibrated on do not fit it, or tell nothing."""

    code = "P0903"
    message = "the calibration data cannot be used: {why}"
    fix = "give a list of batches, each the model's inputs as a tensor, a tuple or a dict of keywords"


class NoLayerMatches(PlaitError):
    """What is to be quantized was named, and the model has no such linear layer."""

    code = "P0904"
    message = "no linear layer of the model matches {pattern}"
    fix = "name layers as the model does, by their last parts, or as re:EXPRESSION; it has: {names}"


class BadScheme(PlaitError):
    """A quantization scheme or a layer's format is not written as schemes are."""

    code = "P0905"
    message = "there is no scheme {text!r}: {why}"
    fix = "schemes are written as awq-w4g128, rtn-w8g64-sym, gptq-w3g32 or w8a8; see docs/quantize.md"


class DamagedCheckpoint(PlaitError):
    """A file of a quantized checkpoint is missing, cut off, or holds something else than its format asks for."""

    code = "P0910"
    message = "the checkpoint file {file} is damaged: {why}"
    fix = "copy or download {file} again, or write the checkpoint anew from the model that it was made of"


class UnsupportedCheckpoint(PlaitError):
    """A checkpoint is in a format, or in a variant of one, that plait does not read."""

    code = "P0911"
    message = "the checkpoint file {file} cannot be read: {why}"
    fix = "{way}"


class CannotWriteCheckpoint(PlaitError):
    """A quantized model cannot be written in the format that was asked for, or not to that place; nothing was changed."""

    code = "P0912"
    message = "no {format} checkpoint was written: {why}"
    fix = "{way}"


class CheckpointMismatch(PlaitError):
    """The tensors of a checkpoint are not those of the model that it is to be loaded into."""

    code = "P0913"
    message = "the checkpoint {folder} does not fit the model: {why}"
    fix = "load it into the model that its config.json describes, with float linear layers of the same names and sizes"


class CannotReplace(PlaitError):
    """A module that is to become a quantized linear layer is no linear layer, or one with other sizes."""

    code = "P0914"
    message = "{name!r} cannot become a quantized linear layer: {why}"
    fix = "name modules of `model.named_modules()` that are a plain torch.nn.Linear of the same sizes"


class CannotResume(PlaitError):
    """Finished layers of a quantization cannot be kept in a folder, or those that are there belong to another call."""

    code = "P0906"
    message = "the folder {folder} cannot be used to resume: {why}"
    fix = (
        "go on with the call that it belongs to, remove it, name another on a disk with room (resume=, --resume), or do "
        "without one (resume=None, --no-resume)"
    )


class BudgetCannotBeMet(PlaitError):
    """No choice of formats for the layers keeps within the budget."""

    code = "P0907"
    message = "the budget {budget} cannot be met: {why}"
    fix = "allow more, or offer other formats (formats=, --format)"


class NoQuantizedKernel(PlaitError):
    """A quantized layer has no generated kernel, and `strict_kernels` asks for one."""

    code = "P0908"
    message = "{op} has no kernel: {why}"
    fix = "take a format that has one (groups of multiples of 32), leave the layer float, or drop strict_kernels"


class CircularSchedule(PlaitError):
    """Launches of a schedule wait for each other, so that none of them would ever start."""

    code = "P1001"
    message = "the schedule never ends: {what}"
    fix = "list launches of a stream in an order in which what they wait for comes first"


class UnknownExperts(PlaitError):
    """A model's mixture of experts has a form that `plait.moe.rewrite` has no ops for. The model is left as it was."""

    code = "P1201"
    message = "the experts of {cls} cannot be rewritten: {why}"
    fix = "known are stacked experts that compute what transformers' MixtralExperts does; build others with plait.moe.MoE"


class UnevenExperts(PlaitError):
    """Experts are to be spread over ranks, and each rank must have equally many."""

    code = "P1202"
    message = "{experts} experts cannot be spread evenly over {ranks} ranks"
    fix = "take a number of experts that the ranks divide, or a group of fewer ranks"


class BadMixture(PlaitError):
    """An argument of a mixture of experts has a value that it cannot have."""

    code = "P1203"
    message = "{what} must be {expected}, not {got}"
    fix = "see docs/moe.md for what the arguments mean"


class CollectiveFailed(PlaitError):
    """A collective broke off: mostly because another rank died, or left its process group after an error of its own.

    The group cannot be used any more on any rank.
    """

    code = "P1101"
    message = "{op} failed on rank {rank} of {size} of group {group!r}{awaited}: {why}"
    fix = "look for the first error in the logs of the other ranks; restart all of them"


class CollectiveTimedOut(PlaitError):
    """Other ranks did not come to a collective in time, stopped within it, or the network between them stalls."""

    code = "P1102"
    message = "{op} has not ended after {seconds} s on rank {rank} of {size} of group {group!r}{awaited}"
    fix = (
        "see where the other ranks are: all must issue the same collectives in the same order; if they are only slow, raise "
        "the setting collective_timeout_s (PLAIT_COLLECTIVE_TIMEOUT_S)"
    )


class ChannelBroken(PlaitError):
    """A collective was refused because an earlier one of its process group failed."""

    code = "P1103"
    message = "{op} was not started on rank {rank}, an earlier collective of group {group!r} failed: {cause}"
    fix = "make the process group anew on all ranks, or restart them"


class PlansDiffer(PlaitError):
    """Ranks of a process group were about to run programs with different collectives, or in another order.

    Found before the first call of a compiled program, through the store of the process group.
    """

    code = "P1104"
    message = (
        "ranks {rank} and {other} of group {group!r} do not run the same collectives; collective {line} is\n"
        "    on rank {rank}: {ours}\n    on rank {other}: {theirs}"
    )
    fix = (
        "give all ranks the same program, options and sizes; what depends on the rank must not decide which collectives run"
    )


class BadExchange(PlaitError):
    """The arguments of an all_to_all_capacity do not fit each other or the process group."""

    code = "P1105"
    message = "all_to_all_capacity cannot exchange these: {why}"
    fix = "give buf [groups, capacity, width], as many groups for each rank, and counts [groups] or rows [groups, 2] in it"


class NoSuchGroup(PlaitError):
    """A collective names a process group that does not exist in this process."""

    code = "P1106"
    message = "there is no process group {name!r}"
    fix = "call torch.distributed.init_process_group first; a compiled program needs the groups that it was compiled with"


class NotRecorded(PlaitError):
    """A rank that runs by itself what it ran with others came to a collective that did not run then."""

    code = "P1107"
    message = "{op} on group {group!r} was not recorded, so that this rank cannot repeat it alone"
    fix = "record a call of the very program that is repeated, on the same inputs"


class PlansWouldChange(PlaitError):
    """A program with collectives was to be compiled with an option that lets another plan take over between two calls.

    Each rank would change at another call, and meanwhile wait for collectives that the others do not run.
    """

    code = "P1108"
    message = "all ranks must run one plan of a program with {op}, but with {option} it would change between calls"
    fix = "leave the option out for programs with collectives"


class WrappedModel(PlaitError):
    """Something would act on gradients during the backward of a compiled training step, which does all of it at once."""

    code = "P1301"
    message = (
        "a training step cannot be compiled with {what}: it acts while autograd runs, and a compiled step has no autograd"
    )
    fix = "{way}"


class LossIsNoScalar(PlaitError):
    """The loss of a training step is not one floating-point number."""

    code = "P1302"
    message = "the loss must be a tensor with one floating-point number, got {got}"
    fix = "let loss(model, *batch) return it, reduced with .mean() or .sum() and before .detach() or .item()"


class NothingToTrain(PlaitError):
    """No gradient would come out of a training step."""

    code = "P1303"
    message = "there is nothing to train: {why}"
    fix = "let parameters require gradients (`requires_grad_()`), and compute the loss from them without no_grad"


class ForeignParameters(PlaitError):
    """Gradients are wanted of a tensor that is no parameter of the model."""

    code = "P1304"
    message = "{what} is no parameter of the model"
    fix = "{way}"


class SeveralDevices(PlaitError):
    """The tensors of a training step lie on more than one device."""

    code = "P1305"
    message = "a training step runs on one device, and its tensors lie on {devices}"
    fix = "move model and batch to one device with .to(...); more devices are more processes, one rank each, and `mesh`"


class CannotCaptureStep(PlaitError):
    """A training step is not one graph: it branches on data, leaves torch, or holds something that cannot be traced."""

    code = "P1306"
    message = "the training step cannot be captured as one graph: {why}"
    fix = "change that place (torch.where or torch.cond instead of `if` on tensors; no .item() or .numpy()), or move it out"


class TooManySignatures(PlaitError):
    """A training step was compiled again and again, for one batch signature after another."""

    code = "P1307"
    message = "this training step was compiled for {count} signatures, and another one came: {why}"
    fix = "pad batches to a few shapes, and keep numbers that change in tensors"


class NotCompiledYet(PlaitError):
    """A training step was asked for its graph before there is one."""

    code = "P1309"
    message = "the training step {name} has not been compiled: its first call does so"
    fix = "call it with a batch first"


class BadMesh(PlaitError):
    """The ranks of a training step are not given as they can be used."""

    code = "P1308"
    message = "the mesh of a training step must be a 1-D DeviceMesh, a ProcessGroup or None, got {got}"
    fix = "take one dimension of a mesh, `mesh['data']`, after torch.distributed.init_process_group(), on every rank of it"


class BadSchedule(PlaitError):
    """A micro-batch schedule cannot be read, or cannot be run: a stage lacks an action, or ranks wait for each other."""

    code = "P1401"
    message = "this is no micro-batch schedule: {why}"
    fix = "let every stage run each micro-batch forward (F), then backward (B, or I and W), on one rank; see docs/stages.md"


class BadProfile(PlaitError):
    """What a model's layers are said to cost cannot be used for planning."""

    code = "P1402"
    message = "this profile of layers cannot be used: {why}"
    fix = "measure it again (`plait plan SRC --profile FILE` writes a new one), or correct the file; see docs/stages.md"


class NoPartition(PlaitError):
    """No way to cut a model into pipeline stages fits the devices."""

    code = "P1403"
    message = "the model cannot be cut into {stages} stages on {devices} devices: {why}"
    fix = "{way}"


class CannotStage(PlaitError):
    """A model cannot be cut into pipeline stages as asked."""

    code = "P1404"
    message = "this model cannot be cut so: {why}"
    fix = "{way}"


class StageLost(PlaitError):
    """A rank of a pipeline cannot go on because another one, or the connection to it, is gone."""

    code = "P1405"
    message = "rank {rank} is without {what}: rank {peer} is gone ({why})"
    fix = "look at what rank {peer} said last; all ranks have to be started again, from the last checkpoint"


class StageTimedOut(PlaitError):
    """A rank of a pipeline waited too long for a value of another one."""

    code = "P1406"
    message = "rank {rank} waited {seconds} s for {what}, which rank {peer} did not send"
    fix = "look at what rank {peer} does; a longer time-out is set with PLAIT_COLLECTIVE_TIMEOUT_S"


class BatchChanged(PlaitError):
    """A batch does not fit the pipeline that was compiled for the first one, or cannot be cut into micro-batches."""

    code = "P1407"
    message = "{what}"
    fix = "{way}"
