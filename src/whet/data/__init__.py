"""From files of records to token ids and labels. The order of the journey:

    read.py            files -> rows, each with its file and line
    formats.py         rows -> examples (conversation, text or preference), whatever the source's format
    examples.py        what an example is; messages.py checks what it says
    split.py           examples -> training and evaluation sides; a row never changes side when others are added
    chat_formats.py    named chat formats; chat_templates.py puts one on a tokenizer, and holds older data-set helpers
    template.py        examples -> input_ids and labels; the one place that renders templates
    labels.py          character spans -> labels; markers.py finds the spans by marker texts
    pack.py            short documents -> full rows, boundaries kept
    prepare.py         all of it, for a recipe

`faults.py` gathers what is wrong with the data, so that all of it is shown at once.
"""
