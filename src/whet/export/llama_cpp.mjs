// Runs a GGUF in llama.cpp through node-llama-cpp, for llama_cpp.py: JSON request on stdin, JSON reply on stdout.
//
// Request: {packages, gguf, threads, tokenize: [text]} or {packages, gguf, threads, generate: [text | ids], maxNewTokens}.
// Reply:   {tokens: [[id]]}                          or {generations: [{promptTokenIds, tokenIds, text, stopped}]}.
// Text is tokenized with special tokens parsed and nothing added around it. Generation is greedy.

import {readFileSync, writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const request = JSON.parse(readFileSync(0, "utf8"));
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(request.packages + "/node-llama-cpp/dist/index.js"));

const llama = await getLlama({
    build: "never", // a binary that is not there is an error, never a download
    skipDownload: true,
    gpu: false,
    progressLogs: false,
    logLevel: LlamaLogLevel.warn,
    logger: (level, message) => process.stderr.write(`${level}: ${message}\n`),
    ...(request.threads ? {maxThreads: request.threads} : {})
});
const model = await llama.loadModel({modelPath: request.gguf, gpuLayers: 0, vocabOnly: request.tokenize != null});

function promptTokens(prompt) {
    return typeof prompt === "string" ? model.tokenize(prompt, true) : prompt;
}

async function generate(sequence, prompt) {
    await sequence.clearHistory();
    const tokenIds = [];
    let stopped = false;
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        stopped = model.isEogToken(token);
        if (stopped)
            break;
        tokenIds.push(token);
        if (tokenIds.length >= request.maxNewTokens)
            break;
    }
    return {promptTokenIds: prompt, tokenIds, text: model.detokenize(tokenIds, false), stopped};
}

async function generateAll(prompts) {
    const longest = Math.max(...prompts.map((prompt) => prompt.length));
    const context = await model.createContext({
        contextSize: longest + request.maxNewTokens + 8,
        ...(request.threads ? {threads: request.threads} : {})
    });
    const sequence = context.getSequence();
    const generations = [];
    for (const prompt of prompts)
        generations.push(await generate(sequence, prompt));
    return generations;
}

const reply = request.tokenize != null
    ? {tokens: request.tokenize.map(promptTokens)}
    : {generations: await generateAll(request.generate.map(promptTokens))};
writeFileSync(1, JSON.stringify(reply));
process.exit(0); // llama.cpp's threads would hold the process
