"""Chat templates of strangers: they run in jinja's sandbox, come to an end, and write what a row could hold."""

import pytest

import welltuned.data.deadline as deadline
from welltuned.data.conversation import Conversation, Message
from welltuned.data.templates import Prompt, render_marked, render_texts
from welltuned.errors import InputError

CHAT = Conversation((Message("user", "hat"), Message("assistant", "red")), "rows.jsonl:1")
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w').write('run') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ ''|attr('__class__')|attr('__base__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ ('%s' % messages).__class__ }}",
    "{% for m in messages %}{{ m.__setitem__('role', 'system') }}{% endfor %}",
    "{% set _ = messages.append({}) %}{{ messages.clear() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ dict.__class__.__base__.__subclasses__() }}",
]
FILES = ["{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}", "{% extends '/etc/passwd' %}"]
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) if n < 30 }}{% endfor %}{% endmacro %}{{ f(0) }}",
]
BROKEN = [
    "{% for a in range(10 ** 10) %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 2.0 ** 10000 }}",
    "{{ [1] | first | abs | foo }}",
]


def _renders(tokenizer, template):
    return render_texts(tokenizer, template, [Prompt(CHAT, 2)])


@pytest.mark.parametrize("template", ESCAPES + FILES)
def test_a_template_cannot_leave_its_sandbox(tiny_tokenizer, canary, template):
    """It is refused, or what it asks for is nothing (undefined, so that it writes nothing of Python's own)."""
    template = template.replace("CANARY", str(canary.path))
    marked = "{% generation %}x{% endgeneration %}" + template
    for render in (
        lambda: _renders(tiny_tokenizer, template)[0],
        lambda: render_marked(tiny_tokenizer, marked, CHAT)[0],
    ):
        try:
            text = render()
        except InputError:
            continue
        assert "built-in" not in text and "<class" not in text and "root:" not in text and "__builtins__" not in text
    assert not canary.sang
    assert CHAT.messages[0].role == "user"  # nor change what it was given


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_fails(tiny_tokenizer, template):
    with pytest.raises(InputError):
        _renders(tiny_tokenizer, template)


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_does_not_end(tiny_tokenizer, monkeypatch, template):
    monkeypatch.setattr(deadline, "SECONDS", 0.3)
    with pytest.raises(InputError, match="does not come to an end"):
        _renders(tiny_tokenizer, template)
    marked = "{% generation %}x{% endgeneration %}" + template
    with pytest.raises(InputError, match="does not come to an end"):
        render_marked(tiny_tokenizer, marked, CHAT)


def test_the_limit_is_lifted_afterwards(tiny_tokenizer, monkeypatch):
    import signal

    before = signal.getsignal(signal.SIGVTALRM)
    assert _renders(tiny_tokenizer, "{{ messages[0]['content'] }}") == ["hat"]
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) is before


def test_another_thread_renders_too(tiny_tokenizer):
    """There is no limit there, and no error either."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_renders, tiny_tokenizer, "{{ messages[0]['content'] }}").result() == ["hat"]


def test_a_template_that_writes_without_end(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(deadline, "LONGEST_TEXT", 10_000)
    with pytest.raises(InputError, match="writes 20,000 characters"):
        _renders(tiny_tokenizer, "{{ 'a' * 20000 }}")


def test_a_model_whose_template_is_hostile(refused, model_copy, data_file, canary, tmp_path):
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert (model_copy / name).is_file() or name == "chat_template.jinja"
    template = "{{ lipsum.__globals__['os'].system('touch CANARY') }}".replace("CANARY", str(canary.path))
    (model_copy / "chat_template.jinja").write_text(template)
    refused("train", "--model", model_copy, "--data", data_file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
