"""Short chat templates in the forms of today's models, and the table of docs/templates.md."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.templates.tokenized import trained_runs
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.segmenters import tokens

CHATML = ("<|im_start|>", "<|im_end|>")
_CALLS = (
    "{%- for call in m.tool_calls or [] %}{%- set f = call.function %}"
    '{{- \'\n<tool_call>\n{"name": "\' + f.name + \'", "arguments": \' }}'
    "{{- f.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}"
)


def _prompt(text):
    return "{%- if add_generation_prompt %}{{- '" + text + "' }}{%- endif %}"


# name: (special tokens, end-of-text token, other added tokens, template)
FORMS = {
    "Qwen 2.5": (
        CHATML,
        "<|im_end|>",
        ("<tool_call>", "</tool_call>"),
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        + _CALLS
        + "{{- '<|im_end|>\n' }}{%- endfor %}"
        + _prompt("<|im_start|>assistant\n"),
    ),
    "Qwen3, SmolLM3: a block of thought in the last turn": (
        CHATML,
        "<|im_end|>",
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
        "{%- set last = namespace(user=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- set said = m.content or '' %}{%- set thought = m.reasoning_content or '' %}"
        "{%- if m.role == 'assistant' and '</think>' in said %}"
        "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{%- if m.role == 'assistant' and loop.index0 > last.user %}"
        "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- said }}"
        + _CALLS
        + "{{- '<|im_end|>\n' }}{%- endfor %}"
        + _prompt("<|im_start|>assistant\n"),
    ),
    "Nemotron: thought in every turn, begun by the prompt": (
        CHATML,
        "<|im_end|>",
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' %}"
        "{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n' }}{%- endif %}"
        "{{- m.content or '' }}"
        + _CALLS
        + "{{- '<|im_end|>\n' }}{%- endfor %}"
        + _prompt("<|im_start|>assistant\n<think>\n"),
    ),
    "gpt-oss: channels": (
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        "<|return|>",
        (),
        "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        "{%- set thought = m.reasoning_content or m.thinking %}{%- if thought %}"
        "{{- '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' }}"
        "{%- endif %}"
        "{%- if m.tool_calls %}{%- set f = m.tool_calls[0].function %}"
        "{{- '<|start|>assistant to=functions.' + f.name }}"
        "{{- '<|channel|>commentary json<|message|>' }}"
        "{{- f.arguments | tojson }}{{- '<|call|>' }}{%- else %}"
        "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{- '<|return|>' if loop.last else '<|end|>' }}{%- endif %}"
        "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
        "{%- endif %}{%- endfor %}" + _prompt("<|start|>assistant"),
    ),
    "DeepSeek-R1: thought is left out": (
        ("<|User|>", "<|Assistant|>", "<|end|>"),
        "<|end|>",
        ("<think>", "</think>"),
        "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        "{{- '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}"
        "{%- elif m.role == 'user' %}{{- '<|User|>' + m.content }}"
        "{%- else %}{{- m.content }}{%- endif %}{%- endfor %}" + _prompt("<|Assistant|>"),
    ),
    "Gemma: contents are trimmed, the system turn joins the question": (
        ("<start_of_turn>", "<end_of_turn>", "<eos>"),
        "<eos>",
        (),
        "{%- set first = namespace(text='') %}{%- for m in messages %}"
        "{%- if m.role == 'system' %}{%- set first.text = m.content + '\n\n' %}{%- else %}"
        "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
        "{{- first.text }}{%- set first.text = '' %}"
        "{%- if m.content is string %}{{- m.content | trim }}{%- else %}"
        "{%- for part in m.content %}{{- part.text | trim }}{%- endfor %}{%- endif %}"
        "{{- '<end_of_turn>\n' }}{%- endif %}{%- endfor %}" + _prompt("<start_of_turn>model\n"),
    ),
    "Llama 3: headers": (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        (),
        "{%- for m in messages %}"
        "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{%- if m.tool_calls %}{%- set f = m.tool_calls[0].function %}"
        '{{- \'{"name": "\' + f.name + \'", "parameters": \' }}{{- f.arguments | tojson }}'
        "{{- '}' }}{%- else %}{{- m.content | trim }}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"
        + _prompt("<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ),
    "Mistral: the question's end is the answer's beginning": (
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>"),
        "</s>",
        (),
        "{%- for m in messages %}{%- if m.role == 'user' %}"
        "{{- '[INST] ' + m.content + '[/INST]' }}{%- elif m.role == 'tool' %}"
        "{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}{%- elif m.tool_calls %}"
        "{%- set f = m.tool_calls[0].function %}"
        '{{- \'[TOOL_CALLS] [{"name": "\' + f.name + \'", "arguments": \' }}'
        "{{- f.arguments | tojson }}{{- '}]</s>' }}{%- elif m.role == 'assistant' %}"
        "{{- ' ' + m.content + '</s>' }}{%- endif %}{%- endfor %}",
    ),
    "Cohere: two tokens end a turn": (
        ("<|START|>", "<|USER|>", "<|BOT|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|END|>"),
        "<|END|>",
        (),
        "{%- for m in messages %}{{- '<|START|>' + ('<|BOT|><|START_RESPONSE|>' "
        "if m.role == 'assistant' else '<|USER|>') + m.content }}"
        "{{- '<|END_RESPONSE|>' if m.role == 'assistant' else '' }}{{- '<|END|>' }}{%- endfor %}"
        + _prompt("<|START|><|BOT|><|START_RESPONSE|>"),
    ),
    "GLM: the next role ends a turn": (
        ("<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        "<|endoftext|>",
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|assistant|>\n' }}"
        "{{- '<think>' + (m.reasoning_content or '') + '</think>\n' + (m.content or '') }}"
        "{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>' + call.function.name }}"
        "{%- for key, value in call.function.arguments.items() %}"
        "{{- '\n<arg_key>' + key + '</arg_key>\n<arg_value>' + value | string + '</arg_value>' }}"
        "{%- endfor %}{{- '\n</tool_call>' }}{%- endfor %}"
        "{%- elif m.role == 'tool' %}{{- '<|observation|>\n' + m.content }}"
        "{%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endif %}{%- endfor %}"
        + _prompt("<|assistant|>"),
    ),
    "Phi: an end of text behind the last turn": (
        ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
        (),
        "{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}"
        "{%- else %}{{- '<|endoftext|>' }}{%- endif %}",
    ),
}
QUESTION = {"role": "user", "content": "What is 2 + 2?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TALKS = {
    "an answer": [QUESTION, {"role": "assistant", "content": "It is four."}],
    "with thought": [
        QUESTION,
        {"role": "assistant", "content": "It is four.", "reasoning_content": "Two and two."},
    ],
    "a call": [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ],
}


def chat_of(name):
    """Return a small byte-level tokenizer with the template and control tokens of a form."""
    special, end, added, template = FORMS[name]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["what is it? it is four. it rains in oslo"], trainer)
    backend.add_tokens(list(added))
    return ChatTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token=end,
            additional_special_tokens=[t for t in special if t != end],
            chat_template=template,
            clean_up_tokenization_spaces=False,
        )
    )


def read(chat, messages):
    """Return (trained text, text for the guard, whether its context is raw) of each response."""
    row = {"messages": messages}
    row |= tokenize_row(row, chat)
    trained = [chat.tokenizer.decode(row["input_ids"][a:b]) for a, b in trained_runs(row["labels"])]
    found = find_responses(row, chat, tokens, 5)
    return [
        (text, response.request.text, response.raw_context)
        for text, response in zip(trained, found, strict=True)
    ]


def renders_all(name, talk):
    """Return whether a template renders all parts of a conversation."""
    template = FORMS[name][3]
    return (talk != "a call" or "tool_calls" in template) and (
        talk != "with thought" or "reasoning_content" in template
    )


def table():
    """Return the table of docs/templates.md."""
    lines = ["| template | row | trained tokens | the guard read | raw |", "|---|---|---|---|---|"]
    for name in FORMS:
        chat = chat_of(name)
        for talk, messages in TALKS.items():
            if renders_all(name, talk):
                rows = read(chat, messages)
                shown = [" · ".join(_code(row[i]) for row in rows) for i in (0, 1)]
                raw = "yes" if any(row[2] for row in rows) else "no"
                lines.append(f"| {name} | {talk} | {shown[0]} | {shown[1]} | {raw} |")
    return "\n".join(lines)


def _code(text):
    return "`" + text.replace("\n", "\\n").replace("|", "\\|") + "`"


if __name__ == "__main__":
    print(table())
