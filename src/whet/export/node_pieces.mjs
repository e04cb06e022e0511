// From a GGUF's tokens to text, for llama_cpp.mjs and for the server's node.mjs.
//
// llama.cpp's own way back "cleans up": with many vocabularies, Llama 3's among them, it drops the blanks before "?",
// "!", "." and "," and around some apostrophes, in code and in French too. So each token's bytes come from its text.

import {StringDecoder} from "node:string_decoder";

const MARK = "\u2581"; // SentencePiece's blank
const MARKED = new Set(["llama", "t5", "gemma4"]); // `tokenizer.ggml.model`
const MARKED_BYTE_PAIRS = new Set(["gemma4", "granite-embed-multi-311m", "sarvam-moe"]); // `tokenizer.ggml.pre`
const BYTE_OF = byteLevelAlphabet();

// GPT-2's byte by character: printable bytes stand for themselves, the others for U+0100 onwards in their order.
function byteLevelAlphabet() {
    const range = (from, to) => Array.from({length: to - from}, (_, index) => from + index);
    const printable = [...range(0x21, 0x7f), ...range(0xa1, 0xad), ...range(0xae, 0x100)];
    const others = range(0, 256).filter((byte) => !printable.includes(byte));
    return new Map([
        ...printable.map((byte) => [String.fromCharCode(byte), byte]),
        ...others.map((byte, index) => [String.fromCharCode(0x100 + index), byte])
    ]);
}

// The bytes that tokens stand for.
export class Pieces {
    constructor(model) {
        const tokenizer = model.fileInfo.metadata.tokenizer;
        this._model = model;
        this._texts = tokenizer.ggml.tokens;
        this._read = reader(tokenizer.ggml);
        this.stripsStart = stripsStart(tokenizer);
    }

    // special: control tokens are written out, in place of left out.
    bytes(token, special) {
        const attributes = this._model.getTokenAttributes(token);
        const text = this._texts[token];
        if (attributes.control || attributes.unknown)
            return Buffer.from(special ? text : "");
        if (attributes.userDefined)
            return Buffer.from(text);
        if (attributes.byte)
            return Buffer.from([parseInt(text.slice(3, 5), 16)]);
        if (attributes.unused)
            return Buffer.alloc(0);
        return this._read == null ? Buffer.from(this._model.detokenize([token], special)) : this._read(text);
    }
}

// An answer's text as its tokens come, in whole characters.
export class Detokenizer {
    constructor(pieces, special) {
        this._pieces = pieces;
        this._special = special;
        this._decoder = new StringDecoder("utf8");
        this._begun = !pieces.stripsStart;
    }

    push(token) {
        return this._told(this._decoder.write(this._pieces.bytes(token, this._special)));
    }

    // What became no character.
    end() {
        return this._told(this._decoder.end());
    }

    _told(text) {
        if (this._begun || text === "")
            return text;
        this._begun = true;
        return text.startsWith(" ") ? text.slice(1) : text;
    }
}

export function textOf(pieces, tokens, special) {
    const detokenizer = new Detokenizer(pieces, special);
    return tokens.map((token) => detokenizer.push(token)).join("") + detokenizer.end();
}

// How a token's text is read; null for kinds of vocabulary that only llama.cpp knows.
function reader({model, pre}) {
    if (MARKED.has(model) || (model === "gpt2" && MARKED_BYTE_PAIRS.has(pre)))
        return (text) => Buffer.from(text.replaceAll(MARK, " "));
    return model === "gpt2" ? byteLevel : null;
}

function byteLevel(text) {
    const bytes = Array.from(text, (character) => BYTE_OF.get(character));
    return bytes.includes(undefined) ? Buffer.from(text) : Buffer.from(bytes);
}

// Whether the blank that a text begins with is the tokenizer's, and no part of it.
function stripsStart({ggml, huggingface}) {
    if (!huggingface?.json)
        return ggml.model === "llama" && (ggml.add_space_prefix ?? true);
    const decoder = JSON.parse(huggingface.json).decoder;
    return (decoder?.decoders ?? [decoder]).some(
        (step) => (step?.type === "Strip" && step.content === " " && step.start > 0)
            || (step?.type === "Metaspace" && step.prepend_scheme !== "never")
    );
}
