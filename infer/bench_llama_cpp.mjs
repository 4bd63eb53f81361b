// node bench_llama_cpp.mjs FOLDER: llama.cpp's side of the duel, in a process of its own; bench_peer.py is transformers'.
//
// FOLDER holds node_modules/node-llama-cpp, which brings llama.cpp built for this processor; it runs on CPU cores alone.
// Started by infer/bench.py, which says on stdin, a JSON line each, what to do, and reads a JSON line for each on stdout:
// first {"file": GGUF, "prompts": [ids], "threads": [counts to try], "new_tokens": n}, then {"new_tokens": n}.
import {readFileSync} from "fs";
import {createInterface} from "readline";

const lines = createInterface({input: process.stdin})[Symbol.asyncIterator]();
const place = `${process.argv[2]}/node_modules/node-llama-cpp`;

// What the next line asks for; null when there is none.
async function next() {
  const {done, value} = await lines.next();
  return done ? null : JSON.parse(value);
}

function say(answer) {
  console.log(JSON.stringify(answer));
}

// Ids of the greedy continuation, from an empty cache; none of them ends it.
async function generate(sequence, prompt, count) {
  await sequence.clearHistory();
  const ids = [];
  for await (const id of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    ids.push(id);
    if (ids.length === count) break;
  }
  return ids;
}

// Wall and CPU seconds of a whole run, and its ids.
async function timed(sequence, prompt, count) {
  const begun = performance.now(), used = process.cpuUsage();
  const ids = await generate(sequence, prompt, count);
  const wall = (performance.now() - begun) / 1e3, {user, system} = process.cpuUsage(used);
  return {wall, cpu: (user + system) / 1e6, tokens: [ids]};
}

// A sequence with the number of threads that is fastest: by the better of two runs with each.
async function fastest(model, setup, prompt) {
  const contextSize = prompt.length + setup.new_tokens;
  let best = {wall: Infinity};
  for (const threads of setup.threads) {
    const context = await model.createContext({contextSize, threads: {ideal: threads, min: threads}});
    const sequence = context.getSequence();
    await generate(sequence, prompt, 2);
    const runs = [await timed(sequence, prompt, setup.new_tokens), await timed(sequence, prompt, setup.new_tokens)];
    const wall = Math.min(...runs.map((run) => run.wall));
    if (wall < best.wall) {
      await best.context?.dispose();
      best = {wall, context, sequence, threads};
    } else await context.dispose();
  }
  return best;
}

const setup = await next();
const prompt = setup.prompts[0];
let llama, side;
try {
  const {getLlama, LlamaLogLevel} = await import(`${place}/dist/index.js`);
  const maxThreads = Math.max(...setup.threads);
  llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads});
  const model = await llama.loadModel({modelPath: setup.file});
  side = await fastest(model, setup, prompt);
} catch (error) {
  say({error: error.message.split("\n")[0]});
  process.exit(1);
}
const {version} = JSON.parse(readFileSync(`${place}/package.json`));
say({versions: {"llama.cpp": llama.llamaCppRelease.release, "node-llama-cpp": version, node: process.version}});
for (let asked; (asked = await next()); )
  say({...(await timed(side.sequence, prompt, asked.new_tokens)), threads: side.threads});
await llama.dispose();
