// node llama_cpp.mjs FOLDER MODEL.gguf PROMPTS.json: llama.cpp's ids of each prompt, and of its greedy answer.
// FOLDER holds node_modules/node-llama-cpp, which brings llama.cpp built for this processor.
import {readFileSync} from "fs";
const [folder, file, prompts] = process.argv.slice(2);
const {getLlama, LlamaLogLevel} = await import(`${folder}/node_modules/node-llama-cpp/dist/index.js`);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 2});
const model = await llama.loadModel({modelPath: file});
for (const {rendered} of JSON.parse(readFileSync(prompts))) {
  const context = await model.createContext({contextSize: 2048, flashAttention: false});
  const prompt = model.tokenize(rendered, true);
  const answer = [];
  for await (const id of context.getSequence().evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    answer.push(id);
    if (answer.length >= 96 || model.isEogToken(id)) break;
  }
  console.log(JSON.stringify({prompt: [...prompt], answer}));
  await context.dispose();
}
await llama.dispose();
