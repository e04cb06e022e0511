// Runs GGUF files in llama.cpp through node-llama-cpp, for llama_cpp.py: JSON request on stdin, JSON reply on stdout.
//
// Request: {packages, threads} and one or more of       Reply:
//   {tokenize: [{gguf, texts: [text]}]}                   {tokens: [[[id]]]}
//   {detokenize: [{gguf, tokens: [[id]]}]}                {texts: [[text]]}
//   {gguf, generate: [text | ids], maxNewTokens}          {generations: [{promptTokenIds, tokenIds, text, stopped}]}
//   {logits: [{gguf, adapter, tokens: [id], start}], out} {vocabularies: [size]}, and in the file `out` float32 rows
// Text is tokenized with special tokens parsed and nothing added around it, and comes back with them written out, but for
// that of a generation. Generation is greedy. A row holds the logits
// of the whole vocabulary after one token, from position `start` on.

import {closeSync, openSync, readFileSync, writeSync} from "node:fs";
import {startLlama} from "./node_llama_cpp.mjs";
import {Pieces, textOf} from "./node_pieces.mjs";

const request = JSON.parse(readFileSync(0, "utf8"));
const {llama, contextOptions} = await startLlama(request);

function load(gguf, vocabOnly = false) {
    return llama.loadModel({modelPath: gguf, gpuLayers: 0, vocabOnly});
}

function promptTokens(model, prompt) {
    return typeof prompt === "string" ? model.tokenize(prompt, true) : prompt;
}

async function tokenizeAll({tokenize}) {
    const tokens = [];
    for (const {gguf, texts} of tokenize) {
        const model = await load(gguf, true);
        tokens.push(texts.map((text) => promptTokens(model, text)));
        await model.dispose();
    }
    return {tokens};
}

async function detokenizeAll({detokenize}) {
    const texts = [];
    for (const {gguf, tokens} of detokenize) {
        const model = await load(gguf, true);
        const pieces = new Pieces(model);
        texts.push(tokens.map((ids) => textOf(pieces, ids, true)));
        await model.dispose();
    }
    return {texts};
}

async function generate(model, pieces, sequence, prompt, maxNewTokens) {
    await sequence.clearHistory();
    const tokenIds = [];
    let stopped = false;
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        stopped = model.isEogToken(token);
        if (stopped)
            break;
        tokenIds.push(token);
        if (tokenIds.length >= maxNewTokens)
            break;
    }
    return {promptTokenIds: prompt, tokenIds, text: textOf(pieces, tokenIds, false), stopped};
}

async function generateAll({gguf, generate: prompts, maxNewTokens}) {
    const model = await load(gguf);
    const ids = prompts.map((prompt) => promptTokens(model, prompt));
    const longest = Math.max(...ids.map((prompt) => prompt.length));
    const context = await model.createContext({contextSize: longest + maxNewTokens + 8, ...contextOptions});
    const sequence = context.getSequence();
    const pieces = new Pieces(model);
    const generations = [];
    for (const prompt of ids)
        generations.push(await generate(model, pieces, sequence, prompt, maxNewTokens));
    return {generations};
}

async function readLogits({logits: readings, out}) {
    const file = openSync(out, "w");
    const vocabularies = [];
    let offset = 0;
    const alike = (one, other) => one.gguf === other.gguf && one.adapter === other.adapter;
    for (const [index, reading] of readings.entries()) {
        if (index > 0 && alike(reading, readings[index - 1]))
            continue; // read together with the one before
        const next = readings.findIndex((other, at) => at > index && !alike(other, reading));
        const together = readings.slice(index, next < 0 ? undefined : next);
        const model = await load(reading.gguf);
        const vocabulary = model.fileInfo.metadata.tokenizer.ggml.tokens.length;
        offset = await readModel(model, vocabulary, together, file, offset);
        vocabularies.push(...together.map(() => vocabulary));
        await model.dispose();
    }
    closeSync(file);
    return {vocabularies};
}

// Writes the rows of all sequences from `offset` on, and returns the offset after them.
async function readModel(model, vocabulary, sequences, file, offset) {
    const context = await model.createContext({
        contextSize: Math.max(...sequences.map(({tokens}) => tokens.length)) + 8,
        flashAttention: false, // it rounds to float16, and so would keys and values kept in the usual type
        experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32",
        ...(sequences[0].adapter ? {lora: sequences[0].adapter} : {}),
        ...contextOptions
    });
    const sequence = context.getSequence();
    const wanted = {generateNext: {logits: true, options: {temperature: 0}}};
    for (const {tokens, start} of sequences) {
        const outside = tokens.find((token) => token < 0 || token >= vocabulary);
        if (outside != null)
            throw new Error(`token ${outside} is outside the file's vocabulary of ${vocabulary}`);
        await sequence.clearHistory();
        const rowStart = offset;
        await sequence.controlledEvaluate(tokens.map((token, index) => index < start ? token : [token, wanted]), {
            onTokenResult: (index, {next}) => writeRow(file, rowStart, index - start, vocabulary, next.logits)
        });
        offset += (tokens.length - start) * vocabulary * Float32Array.BYTES_PER_ELEMENT;
    }
    return offset;
}

function writeRow(file, rowStart, index, vocabulary, logits) {
    const row = new Float32Array(vocabulary).fill(Number.NaN); // a token that llama.cpp leaves out would be seen
    for (const [token, logit] of logits)
        row[token] = logit;
    writeSync(file, row, 0, row.byteLength, rowStart + index * row.byteLength);
}

const tasks = {tokenize: tokenizeAll, detokenize: detokenizeAll, logits: readLogits, generate: generateAll};
const reply = {};
for (const [name, task] of Object.entries(tasks)) {
    if (request[name] != null)
        Object.assign(reply, await task(request));
}
// A pipe takes a long reply piece by piece; after the last, llama.cpp's threads would hold the process.
process.stdout.write(JSON.stringify(reply), () => process.exit(0));
