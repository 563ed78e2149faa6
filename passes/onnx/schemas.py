#!/usr/bin/env python3
"""Writes what ONNX says of each version of each operator, as the importer checks it, from onnx's own schemas.

    passes/onnx/schemas.py            write passes/onnx/src/schema/operators.txt
    passes/onnx/schemas.py --check    say whether it is as it would be written

The table is committed and reviewed: a new version of the package `onnx` shows as a difference of lines, one to a version
of an operator. Needs Python 3.9 or newer. Runs where the package is in the version named here: in this interpreter, in
fixtures/.venv, or else in a virtual environment made for the moment, which needs the network.
"""

import argparse
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import venv
from typing import Iterable, List

ONNX = "1.23.2"
HERE = pathlib.Path(__file__).resolve().parent
TABLE = HERE / "src" / "schema" / "operators.txt"
FIXTURES_VENV = HERE.parent.parent / "fixtures" / ".venv"

HEADER = """\
# What ONNX says of each version of each operator. Written by passes/onnx/schemas.py from the schemas of
# onnx {version} (IR {ir}, opset {opset}); do not edit.
#
# NAME SINCE (INPUTS) -> (OUTPUTS) [ATTRIBUTES] where VARIABLE: TYPES, ...
#
# An input or output is NAME: TYPE; NAME? is optional, NAME+ is one or more, NAME* any number. Its type is a set of types or
# a variable, which stands for one type wherever it is written; `each` before it: for one of its set, in each place anew.
# `outputs N|M` after the outputs: no other number of them. An attribute is NAME: KIND; NAME! has to be given.
# `deprecated`: ONNX has removed the operator from this version on.
"""

# Types in our names, and the names of sets of them.
TYPES = {"float16": "f16", "float": "f32", "double": "f64", "bfloat16": "bf16"}
TYPES.update({f"int{bits}": f"i{bits}" for bits in (2, 4, 8, 16, 32, 64)})
TYPES.update({f"uint{bits}": f"u{bits}" for bits in (2, 4, 8, 16, 32, 64)})
TYPES.update({f"float8{form}": f"f8{form}" for form in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0")})
TYPES.update({"float6e2m3": "f6e2m3", "float6e3m2": "f6e3m2", "float4e2m1": "f4e2m1"})
TYPES.update({name: name for name in ("bool", "string", "complex64", "complex128")})
SETS = {
    "floats": ["f16", "f32", "f64"],
    "ints": ["i8", "i16", "i32", "i64"],
    "uints": ["u8", "u16", "u32", "u64"],
    "float8s": ["f8e4m3fn", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz"],
    "complexes": ["complex64", "complex128"],
}

# Operators that ONNX took back without a trace while they were experimental, and that models of that time have.
TAKEN_BACK = {"": ["Affine 1 (X: T) -> (Y: T) [alpha: float, beta: float] where T: floats"]}


def types(names: Iterable[str]) -> List[str]:
    """Names of types, in our words, with sets where all of one is there."""
    rest = {TYPES[name] for name in names}
    words = []
    for name, members in SETS.items():
        if rest.issuperset(members):
            words.append(name)
            rest.difference_update(members)
    return sorted(words + sorted(rest))


def type_set(allowed: Iterable[str]) -> str:
    """What ONNX writes as `tensor(float)`, `seq(tensor(int64))`..., by container."""
    containers: dict = {}
    words = []
    for text in allowed:
        match = re.fullmatch(r"((?:seq\(|optional\()*)tensor\((\w+)\)\)*", text)
        if match:
            containers.setdefault(match.group(1), []).append(match.group(2))
        else:
            words.append(text.replace(" ", ""))
    for container, names in sorted(containers.items()):
        inner = types(names)
        if container:
            words.append(container + "|".join(inner) + ")" * container.count("("))
        else:
            words = inner + words
    return " ".join(words)


def formals(parameters: list) -> str:
    """Inputs or outputs."""
    texts = []
    for parameter in parameters:
        option = str(parameter.option).rsplit(".", maxsplit=1)[-1]
        many = {0: "*", 1: "+"}
        suffix = {"Single": "", "Optional": "?", "Variadic": many.get(parameter.min_arity)}[option]
        if suffix is None:
            sys.exit(f"error: {parameter.name} stands for {parameter.min_arity} or more, which the table cannot say")
        kind = parameter.type_str if re.fullmatch(r"\w+", parameter.type_str) else type_set([parameter.type_str])
        texts.append(f"{parameter.name}{suffix}: {'' if parameter.is_homogeneous else 'each '}{kind}")
    return f"({', '.join(texts)})"


def output_counts(schema) -> str:
    """The numbers of outputs that are allowed, where they are not all from the least to the most. Asked of the checker,
    because a schema does not tell."""
    import onnx
    from onnx import checker, helper

    if schema.deprecated or schema.max_output > 100:
        return ""
    context = checker.C.CheckerContext()
    context.ir_version = onnx.IR_VERSION
    context.opset_imports = {schema.domain: schema.since_version}
    allowed = []
    for count in range(schema.min_output, schema.max_output + 1):
        outputs = [f"y{position}" for position in range(count)]
        inputs = [f"x{position}" for position in range(schema.min_input)]
        try:
            checker.check_node(helper.make_node(schema.name, inputs, outputs, domain=schema.domain), context)
        except checker.ValidationError as error:
            if "not in allowed output sizes" in str(error):
                continue
        allowed.append(count)
    whole = len(allowed) == schema.max_output - schema.min_output + 1
    return "" if whole else f" outputs {'|'.join(map(str, allowed))}"


def row(schema) -> str:
    """One version of an operator."""
    text = f"{schema.name} {schema.since_version}{' deprecated' if schema.deprecated else ''}"
    text += f" {formals(schema.inputs)} -> {formals(schema.outputs)}{output_counts(schema)}"
    if schema.attributes:
        kinds = {name: str(rule.type).rsplit(".", maxsplit=1)[-1].lower() for name, rule in schema.attributes.items()}
        words = [f"{name}{'!' if schema.attributes[name].required else ''}: {kinds[name]}" for name in sorted(kinds)]
        text += f" [{', '.join(words)}]"
    variables = [f"{v.type_param_str}: {type_set(v.allowed_type_strs)}" for v in schema.type_constraints]
    if variables:
        text += f" where {', '.join(sorted(variables))}"
    return text


def table() -> str:
    """The whole file."""
    import onnx
    from onnx import defs

    lines = [HEADER.format(version=ONNX, ir=int(onnx.IR_VERSION), opset=defs.onnx_opset_version())]
    lines += [f"set {name}: {' '.join(members)}" for name, members in SETS.items()]
    schemas = defs.get_all_schemas_with_history()
    for domain in sorted({schema.domain for schema in schemas}):
        lines.append(f"\ndomain {domain or 'ai.onnx'}")
        rows = TAKEN_BACK.get(domain, []) + [row(schema) for schema in schemas if schema.domain == domain]
        lines += sorted(rows, key=lambda text: (text.split()[0], int(text.split()[1])))
    return "\n".join(lines) + "\n"


def has_onnx() -> bool:
    """Whether this interpreter has the package in the right version."""
    try:
        return importlib.metadata.version("onnx") == ONNX
    except importlib.metadata.PackageNotFoundError:
        return False


def python_of(folder: pathlib.Path) -> str:
    """The interpreter of a virtual environment."""
    return str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def in_another_environment() -> int:
    """Runs this script again where the package is."""
    python = python_of(FIXTURES_VENV)
    probe = f"import importlib.metadata as m; raise SystemExit(m.version('onnx') != '{ONNX}')"
    if os.path.exists(python) and subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0:
        return subprocess.run([python, __file__, *sys.argv[1:]], check=False).returncode
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = python_of(pathlib.Path(folder))
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"onnx=={ONNX}"]
        if subprocess.run(install, check=False).returncode != 0:
            sys.exit(f"error: pip could not install onnx {ONNX}; is the network reachable?")
        return subprocess.run([python, __file__, *sys.argv[1:]], check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    if not has_onnx():
        sys.exit(in_another_environment())
    text = table()
    if arguments.check:
        if TABLE.read_text(encoding="utf-8") != text:
            sys.exit(f"error: {TABLE.name} is not what onnx {ONNX} says; run passes/onnx/schemas.py and review the difference")
        print(f"{TABLE.name}: as onnx {ONNX} says")
    else:
        TABLE.write_text(text, encoding="utf-8")
        print(f"{TABLE.name}: {sum(1 for line in text.splitlines() if '->' in line)} lines of operators")


if __name__ == "__main__":
    main()
