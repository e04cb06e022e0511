// A GGUF in llama.cpp through node-llama-cpp, for process.py: JSON lines in on stdin, JSON lines out on stdout.
//
// argv[2]: {packages, gguf, sequences, context, threads}.
// In:  {generate: id, prompt: text | ids, bos, special, maxTokens, sampling, logprobs, schema}, {cancel: id}.
// Out: {ready: {context, vocabulary, template, bos, eos, tokenizer}}, then by id:
//      {id, text, prompt, entry?: {bytes, logprob, top}} for each token, then one of
//      {id, end: "stop" | "length", text, prompt, drawn}, {id, refused}, {id, failed}.
// Text is whole characters. Sequences that have a token to draw are decoded in one batch.

import {createInterface} from "node:readline";
import {startLlama} from "../../../export/node_llama_cpp.mjs";
import {Detokenizer, Pieces} from "../../../export/node_pieces.mjs";

const settings = JSON.parse(process.argv[2]);
const {library, llama, contextOptions} = await startLlama(settings);
const {TokenBias, LlamaGrammarEvaluationState} = library;
const model = await llama.loadModel({modelPath: settings.gguf, gpuLayers: 0});
const context = await model.createContext({
    contextSize: Math.min(settings.context, model.trainContextSize),
    sequences: settings.sequences,
    ...contextOptions
});
const pieces = new Pieces(model);
const free = Array.from({length: settings.sequences}, () => context.getSequence());
const longest = free[0].contextSize;
const waiting = [];
const cancelled = new Set();
const known = new Set();

function send(message) {
    process.stdout.write(JSON.stringify(message) + "\n");
}

function promptTokens(order) {
    const tokens = typeof order.prompt === "string" ? model.tokenize(order.prompt, true) : order.prompt;
    const begins = order.bos && model.tokens.shouldPrependBosToken && tokens[0] !== model.tokens.bos;
    return begins ? [model.tokens.bos, ...tokens] : tokens;
}

async function options(order, drawn) {
    const {temperature, topP, topK, seed, presence, frequency, bias} = order.sampling;
    const tokenBias = new TokenBias(model.tokenizer);
    for (const [token, logit] of bias)
        tokenBias.set(token, {logit});
    const grammar = order.schema == null
        ? null
        : Object.keys(order.schema).length === 0
            ? await llama.createGrammar({grammar: order.anyObject})
            : await llama.createGrammarForJsonSchema(order.schema);
    return {
        temperature, topP, topK, minP: 0, seed, yieldEogToken: true,
        ...(bias.length ? {tokenBias} : {}),
        ...(presence || frequency
            ? {
                repeatPenalty: {
                    punishTokens: () => drawn, maxPunishTokens: longest, penalty: 1,
                    presencePenalty: presence, frequencyPenalty: frequency
                }
            }
            : {}),
        ...(grammar == null ? {} : {grammarEvaluationState: new LlamaGrammarEvaluationState({model, grammar})})
    };
}

function named(probabilities, token, most) {
    const entry = ([id, probability]) => ({bytes: [...pieces.bytes(id, true)], logprob: Math.log(probability)});
    const top = [];
    for (const pair of probabilities) {
        if (top.length >= most)
            break;
        top.push(entry(pair));
    }
    return {...entry([token, probabilities.get(token)]), top};
}

// Grammars let white space follow the JSON, without a need to end: models that know no JSON go on with it.
function isFollowedBySpace(json) {
    if (!/\s$/.test(json))
        return false;
    try {
        JSON.parse(json);
        return true;
    } catch {
        return false;
    }
}

async function answer(order, sequence) {
    const id = order.generate;
    const prompt = promptTokens(order);
    if (prompt.length === 0)
        return send({id, refused: "the prompt is empty"});
    const room = longest - prompt.length;
    if (room < 1) {
        const refused = `the prompt has ${prompt.length} tokens, and the model reads ${longest} with its answer`;
        return send({id, refused});
    }
    const most = Math.min(order.maxTokens, room);
    const drawn = [];
    const detokenizer = new Detokenizer(pieces, order.special);
    let count = 0, end = "length", whole = "";
    const asked = {probabilities: order.logprobs != null};
    const how = await options(order, drawn);
    for await (const {token, probabilities} of sequence.evaluateWithMetadata(prompt, asked, how)) {
        if (cancelled.has(id))
            return;
        count++;
        if (model.isEogToken(token)) {
            end = "stop";
            break;
        }
        drawn.push(token);
        const entry = order.logprobs != null ? {entry: named(probabilities, token, order.logprobs)} : {};
        let text = detokenizer.push(token);
        whole += text;
        const finished = order.schema != null && isFollowedBySpace(whole);
        if (finished)
            text = text.trimEnd();
        send({id, text, prompt: prompt.length, ...entry});
        if (finished) {
            end = "stop";
            break;
        }
        if (count >= most)
            break;
    }
    send({id, end, text: detokenizer.end(), prompt: prompt.length, drawn: count});
}

async function run(order, sequence) {
    try {
        await sequence.clearHistory();
        await answer(order, sequence);
    } catch (error) {
        send({id: order.generate, failed: String(error?.message ?? error)});
    } finally {
        cancelled.delete(order.generate);
        known.delete(order.generate);
        const next = waiting.shift();
        if (next == null)
            free.push(sequence);
        else
            run(next, sequence);
    }
}

send({
    ready: {
        context: longest,
        vocabulary: [...model.iterateAllTokens()].length,
        template: model.fileInfo.metadata.tokenizer?.chat_template ?? null,
        bos: model.tokens.bosString,
        eos: model.tokens.eosString,
        tokenizer: model.fileInfo.metadata.tokenizer?.huggingface?.json ?? null
    }
});

for await (const line of createInterface({input: process.stdin})) {
    const order = JSON.parse(line);
    if (order.cancel != null) {
        const place = waiting.findIndex((other) => other.generate === order.cancel);
        if (place >= 0)
            known.delete(waiting.splice(place, 1)[0].generate);
        else if (known.has(order.cancel))
            cancelled.add(order.cancel);
        continue;
    }
    known.add(order.generate);
    if (free.length)
        run(order, free.pop());
    else
        waiting.push(order);
}
process.exit(0); // stdin is closed: whoever started this is gone
