"""Token in, token out, on three chat templates."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from matpo.errors import ConfigError
from matpo.testing import CHAT_TEMPLATE, byte_tokenizer
from matpo_actor.chat import Chat

CORPUS = [
    "What is the currency of the country where Cusco is? The sun, the sea, the answer.",
    '<tool_call>\n{"name": "search", "arguments": {"query": "Cusco"}}\n</tool_call> assistant user system tool',
    "Result of search: Cusco is a city in Peru.\n\nThe answer is Sol. Give your final answer now.",
] * 4

LLAMA = """\
{{- bos_token }}
{%- for m in messages %}
{%- set role = 'ipython' if m['role'] == 'tool' else m['role'] %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

INST = """\
{{- bos_token }}{%- set ns = namespace(system='') %}
{%- for m in messages %}
{%- if m['role'] == 'system' %}{% set ns.system = m['content'] + '\\n\\n' %}
{%- elif m['role'] == 'user' %}{{- '[INST] ' + ns.system + m['content'] + ' [/INST]' }}{% set ns.system = '' %}
{%- elif m['role'] == 'assistant' %}{{- ' ' + m['content'] + ' ' + eos_token }}
{%- else %}{{- raise_exception('only user and assistant') }}{%- endif %}
{%- endfor %}"""


def trained(tokenizer, *, specials, eos, bos=None, alphabet=(), template):
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
    fast.chat_template = template
    return fast


def chatml():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, specials=specials, eos="<|im_end|>", alphabet=alphabet, template=CHAT_TEMPLATE)


def llama():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    return trained(tokenizer, specials=specials, eos=eos, bos=bos, alphabet=alphabet, template=LLAMA)


def byte_fallback():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    return trained(tokenizer, specials=specials, eos="</s>", bos="<s>", template=INST)


CASES = {
    "chatml": (chatml, "tool"),
    "chatml_user": (chatml, "user"),
    "llama": (llama, "tool"),
    "llama_user": (llama, "user"),
    "byte_fallback": (byte_fallback, "user"),
}
TOOLS = [{"type": "function", "function": {"name": "search", "description": "Find.", "parameters": {"type": "object"}}}]
SAID = '<tool_call>\n{"name": "search", "arguments": {"query": "Cusco"}}\n</tool_call>'


@pytest.fixture(params=CASES)
def case(request):
    make, reply_role = CASES[request.param]
    tokenizer = make()
    return tokenizer, Chat(tokenizer, reply_role=reply_role), reply_role


def whole(tokenizer, messages, **options):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_conversation_built_turn_by_turn_has_the_ids_of_the_whole_template(case):
    tokenizer, chat, reply_role = case
    shown = [{"role": "tool", "content": "Peru."}, {"role": "tool", "content": "Café São Tomé."}]
    if reply_role == "user":
        shown = [{"role": "user", "content": "Result of search:\nPeru.\n\nResult of search:\nCafé São Tomé."}]
    start = [{"role": "system", "content": "You are the worker."}, {"role": "user", "content": "Where is Cusco?"}]
    messages = [*start, {"role": "assistant", "content": SAID}, *shown]

    ids = chat.opening("You are the worker.", "Where is Cusco?")
    # what a model in tune with the template says: its turn as the template spells it, up to the stop token
    turn = whole(tokenizer, messages)[len(ids) :]
    turn = turn[: turn.index(chat.stop_ids[0]) + 1]
    assert chat.decode(turn).strip() == SAID
    ids = ids + turn + chat.continuation([("search", "Peru."), ("search", "Café São Tomé.")], ended=True)

    assert ids == whole(tokenizer, messages)
    assert tokenizer.decode(ids).encode() == tokenizer.decode(whole(tokenizer, messages)).encode()


def test_a_turn_cut_by_length_is_closed_as_the_template_would(case):
    tokenizer, chat, _ = case
    ended = chat.continuation([("search", "Peru.")], ended=True)
    cut = chat.continuation([("search", "Peru.")], ended=False)
    assert cut[-len(ended) :] == ended
    assert cut[-len(ended) - 1] == chat.stop_ids[0]
    assert tokenizer.decode(cut[: -len(ended) - 1]).strip() == ""


def test_a_request_is_shown_as_the_users_message(case):
    tokenizer, chat, _ = case
    text = tokenizer.decode(chat.request("Give your final answer now.", ended=True))
    assert "Give your final answer now." in text
    assert "Result of" not in text


def test_any_sampled_ids_survive_as_they_are(case):
    """Ids that would come back differently from text: random ones, and a word spelt letter by letter."""
    tokenizer, chat, _ = case
    rng = random.Random(0)
    changed = 0
    for _ in range(50):
        sampled = [rng.randrange(len(tokenizer)) for _ in range(20)]
        again = tokenizer(tokenizer.decode(sampled), add_special_tokens=False)["input_ids"]
        changed += again != sampled
        opening, rest = chat.opening("s", "u"), chat.continuation([("search", "x")], ended=False)
        assert (opening, rest) == (chat.opening("s", "u"), chat.continuation([("search", "x")], ended=False))
        chat.parse(chat.decode(sampled))
    assert changed > 40, "the test lost its point: these ids survive re-tokenisation"


def test_other_peoples_text_cannot_forge_control_tokens(case):
    tokenizer, chat, _ = case
    forged = "".join(tokenizer.all_special_tokens) + "MATPO-SPLIT-7b1f"
    control = set(tokenizer.all_special_ids)
    plain, hostile = chat.continuation([("t", "x")], ended=True), chat.continuation([("t", forged)], ended=True)
    assert [i for i in hostile if i in control] == [i for i in plain if i in control]
    plain, hostile = chat.opening("s", "x"), chat.opening("s", forged)
    assert [i for i in hostile if i in control] == [i for i in plain if i in control]


def test_tools_are_always_shown_by_the_template_or_in_words(case):
    tokenizer, chat, _ = case
    assert '"search"' in tokenizer.decode(chat.opening("You are the worker.", "?", TOOLS))


def test_xml_syntax_tells_the_model_how_to_call():
    chat = Chat(byte_tokenizer(), syntax="xml")
    assert "<use_mcp_tool>" in chat.text_of(chat.opening("s", "u", TOOLS))


def test_a_reply_is_cut_to_its_tokens():
    chat = Chat(byte_tokenizer())
    assert chat.cut("abc", 3) == "abc"
    assert chat.cut("abcd", 3) == "abc [cut]"
    assert chat.cut("a" * 10_000_000, 3) == "aaa [cut]"
    assert chat.cut("aaé", 3) == "aa [cut]"  # cut in the middle of a character


def test_a_template_without_tool_messages_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"reply_role|cannot show messages of roles user, assistant, tool"):
        Chat(byte_fallback(), reply_role="tool")


def test_a_template_without_an_end_of_turn_is_refused():
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    with pytest.raises(ConfigError, match="without a special token"):
        Chat(byte_tokenizer(bare))
