"""Templates that would run for ever, fill the memory or reach outside end in a refusal."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from lora_edge.errors import DataError
from lora_edge.runtime.text.chat import ChatTemplates

# Doubles something seventy times: a value that is small in memory and endless when looked through.
_GROW = "{{% set ns = namespace(a={0}, b={0}) %}}{{% for i in range(70) %}}{1}{{% endfor %}}"
_LISTS = _GROW.format("['x']", "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}")
_TUPLES = _GROW.format("('x',)", "{% set ns.a = (ns.a, ns.a) %}")
_DEEP = (
    "{% set ns = namespace(a=()) %}{% for i in range(99999) %}{% set ns.a = (ns.a,) %}{% endfor %}"
)
_BIG = "{% set big = 'a' * 10000000 %}"
LONG = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}"
    "{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if i < 0 %}{% endfor %}"
    "{% endfor %}",
    "loops within expressions": "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "recursive macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(90) }}",
    "recursive loops": "{% for i in [90] recursive %}{% if i %}{{ loop([i - 1]) }}"
    "{{ loop([i - 1]) }}{% endif %}{% endfor %}",
    "equal lists": _LISTS + "{{ ns.a == ns.b }}",
    "a list in a list": _LISTS + "{{ ns.a in [ns.b] }}",
    "sorted lists": _LISTS + "{{ [ns.a, ns.b] | sort }}",
    "hashed tuples": _TUPLES + "{{ {ns.a: 1} }}",
    "looked up tuples": _TUPLES + "{{ {}[ns.a] }}",
    "unique tuples": _TUPLES + "{{ [ns.a] | unique | list }}",
    "the test eq": _LISTS + "{{ ns.a is eq ns.b }}",
    "changed": _LISTS + "{% for i in [1, 2] %}{{ loop.changed(ns.a if i == 1 else ns.b) }}"
    "{% endfor %}",
    "powers": "{{ 2 ** 100000000 }}",
    "precision": "{{ 1.5 | round(100000000, 'floor') }}",
    "strip": _BIG + "{{ big.strip('b' * 1000000 ~ 'a') }}",
    "slices": _BIG + "{{ big[1:] | length }}" * 3000,
    "punycode": "{{ ('ü' * 1000000).encode('punycode') }}",
}
LARGE = {
    "times": "{{ 'a' * 3000000000 }}",
    "times, turned": "{{ 3000000000 * [1] }}",
    "times, twice": "{{ ('a' * 30000) * 1000000 }}",
    "center": "{{ 'a' | center(3000000000) }}",
    "center, method": "{{ 'a'.center(3000000000) }}",
    "zfill": "{{ 'a'.zfill(3000000000) }}",
    "attr": "{{ ('a' | attr('ljust'))(3000000000) }}",
    "map": "{{ (['a'] * 999) | map('center', 999999) | list }}",
    "to_bytes": "{{ (1).to_bytes(3000000000, 'big') }}",
    "percent": "{{ '%3000000000d' % 1 }}",
    "percent, named": "{{ '%(a(b))3000000000d' % {'a(b)': 1} }}",
    "percent, given": "{{ '%*d' % (1000000000, 1) }}",
    "percent, precision": "{{ '%.1000000000f' | format(1.0) }}",
    "format": "{{ '{:>3000000000}'.format(1) }}",
    "format, given": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "format_map": "{{ '{a:>3000000000}'.format_map({'a': 1}) }}",
    "format, fields": "{% set big = 'a' * 1000000 %}{{ ('{0}' * 10000).format(big) }}",
    "doubling": _GROW.format("'xx'", "{% set ns.a = ns.a ~ ns.a %}") + "{{ ns.a | length }}",
    "doubling, plus": _GROW.format("'xx'", "{% set ns.a = ns.a + ns.a %}"),
    "doubling, set": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
    "doubling, replace": _GROW.format("'x'", "{% set ns.a = ns.a | replace('x', 'xx') %}"),
    "doubling, join": _GROW.format("'x'", "{% set ns.a = [ns.a, ns.a] | join %}"),
    "kept": "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}"
    "{% set ns.a = ns.a + ['a' * 100000] %}{% endfor %}",
    "printed": _LISTS + "{{ ns.a }}",
    "as JSON": _LISTS + "{{ ns.a | tojson }}",
    "as text": _LISTS + "{{ ns.a | string }}",
    "as text, ~": _LISTS + "{{ 'x' ~ ns.a }}",
    "as text, %s": _LISTS + "{{ '%s' % ns.a }}",
    "as text, map": _LISTS + "{{ [ns.a] | map('string') | list }}",
    "itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "deep": _DEEP + "{{ {ns.a: 1} }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) }}",
    "tojson, indent": "{{ [[1]] | tojson(indent=3000000000) }}",
    "tojson, separators": "{{ ([1] * 100000) | tojson(separators=('x' * 100000, ':')) }}",
    "batch": "{{ [1] | batch(3000000000, 0) | list }}",
    "slice": "{{ [1] | slice(3000000000, 0) | list }}",
    "replace": "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
    "join": "{{ ('a' * 1000000) | join('b' * 1000000) }}",
    "join, method": "{{ ('b' * 1000000).join('a' * 1000000) }}",
    "join, lazy": "{% set big = ['a' * 1000000] * 9999 %}{{ ''.join(big | map('default')) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "sum": "{{ ([[1] * 1000] * 100000) | sum(start=[]) }}",
    "text in a loop": "{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}",
    "text in a macro": "{% macro f() %}" + "x" * 99999 + "{% endmacro %}"
    "{% set ns = namespace(a='') %}{% for i in range(99999) %}{% set ns.a = f() %}{% endfor %}",
    "text in a filter": "{% for i in range(99999) %}{% filter upper %}" + "x" * 99999
    + "{% endfilter %}{% endfor %}",
    "generation": "{% for i in range(99999) %}{% generation %}" + "x" * 99999
    + "{% endgeneration %}{% endfor %}",
    "time": "{{ strftime_now('%Y' * 1000000) }}",
    "lorem": "{{ lipsum(100000000) }}",
}  # fmt: skip
OTHER = {
    "zero": "{{ 1 / 0 }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "endless blocks": "{% block a %}{{ self.a() }}{% endblock %}",
    "ranges": "{{ range(10 ** 12) | list }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "minus": "{{ " + "-" * 50000 + "1 }}",
    "loops in loops": "{% for i in [1] %}" * 50 + "{% endfor %}" * 50,
    "missing": "{{ x.y.z }}",
    "types": "{{ 1 + 'a' }}",
    "keys": "{{ messages[0] + messages }}",
    "unknown filter": "{{ 1 | nothing }}",
    "refusal": "{{ raise_exception('no') }}",
    "changes": "{{ messages.append(1) }}",
    "classes": "{{ ''.__class__.__mro__ }}{{ ().__class__.__bases__[0].__subclasses__() }}",
    "our own filters": "{{ (-5) | step }}",
    "a private name": "{% set ns = namespace(__class__=1) %}",
    "long": "x" * 2_000_000,
    "attribute of a format": "{{ '{0.__class__.__mro__}'.format('') }}",
}


def _refused(source: str) -> str:
    with pytest.raises(DataError) as refused:
        ChatTemplates({"default": source}, {}, "x").render("hi")
    assert refused.value.hint
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", LONG)
def test_templates_that_take_long_are_stopped(name: str) -> None:
    started = time.process_time()
    assert "was stopped" in _refused(LONG[name])
    assert time.process_time() - started < 8  # the limit is 2 s


@pytest.mark.parametrize("name", OTHER)
def test_whatever_a_template_raises_is_a_refusal(name: str) -> None:
    _refused(OTHER[name])


_SCRIPT = """
import resource
from lora_edge.errors import DataError
from lora_edge.runtime.text.chat import ChatTemplates
ChatTemplates({{"default": "x"}}, {{}}, "x").render("hi")
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + {room}, size + {room}))
for name, source in {large!r}.items():
    try:
        ChatTemplates({{"default": source}}, {{}}, "x").render("hi")
    except DataError as error:
        stopped = "was stopped" in str(error) or "lipsum" in str(error)
        print(name, "|", "stopped" if stopped else error)
    else:
        print(name, "| rendered")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_templates_that_make_much_are_stopped_within_little_memory() -> None:
    script = _SCRIPT.format(large=LARGE, room=500 << 20)
    done = subprocess.run(
        [sys.executable, "-"], input=script, capture_output=True, text=True, check=True, timeout=300
    )
    found = dict(line.split(" | ", 1) for line in done.stdout.splitlines())
    assert found == dict.fromkeys(LARGE, "stopped")


def test_limits_hold_in_threads_and_do_not_add_up() -> None:
    """Two renderings at once have a budget each; a sound one is not hurt by its neighbour."""
    said: dict[int, str] = {}
    good = ChatTemplates({"default": "{% for i in range(2000) %}x{% endfor %}"}, {}, "x")

    def run(index: int) -> None:
        if index % 2:
            said[index] = _refused(LONG["nested loops"])
        else:
            said[index] = "".join(good.render("hi") for _ in range(5))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert said[0] == said[2] == "x" * 10000
    assert "was stopped" in said[1]
    assert "was stopped" in said[3]


def test_a_sound_template_is_rendered_again_and_again() -> None:
    """A budget belongs to one rendering."""
    templates = ChatTemplates({"default": "{% for i in range(30000) %}x{% endfor %}"}, {}, "x")
    for _ in range(20):
        assert len(templates.render("hi")) == 30000
