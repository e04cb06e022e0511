// llama.cpp through node-llama-cpp, started as whet wants it: for llama_cpp.mjs and for the server's node.mjs.

import {pathToFileURL} from "node:url";

// packages: the folder node_modules. threads: that compute.
// `library` is the package, `contextOptions` goes into each context.
export async function startLlama({packages, threads}) {
    const library = await import(pathToFileURL(packages + "/node-llama-cpp/dist/index.js"));
    const llama = await library.getLlama({
        build: "never", // a binary that is not there is an error, never a download
        skipDownload: true,
        gpu: false,
        progressLogs: false,
        logLevel: library.LlamaLogLevel.warn,
        logger: (level, message) => process.stderr.write(`${level}: ${message}\n`),
        maxThreads: threads
    });
    return {library, llama, contextOptions: {threads}};
}
