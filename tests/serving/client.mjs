// What the AI SDK makes of a server's answers, as JSON. node client.mjs http://.../v1
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";

const baseURL = process.argv[2];
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ baseURL, apiKey: "none", name: "flashmoe", includeUsage: true });
const request = { prompt: "Name a colour.", maxOutputTokens: 12, maxRetries: 0 };
const found = {};
const models = { chat: openai.chat("demo"), responses: openai.responses("demo"), compatible: compatible("demo") };
for (const [name, model] of Object.entries(models)) {
  const whole = await generateText({ ...request, model });
  const stream = streamText({ ...request, model });
  let streamed = "";
  for await (const piece of stream.textStream) streamed += piece;
  const usage = await stream.usage;
  found[name] = { whole: whole.text, streamed, finish: whole.finishReason, tokens: usage.outputTokens };
}
const weather = tool({
  description: "The weather",
  inputSchema: jsonSchema({ type: "object", properties: { days: { enum: [1, 2] } }, required: ["days"] }),
});
for (const name of ["chat", "compatible"]) {
  const called = await generateText({
    ...request, model: models[name], maxOutputTokens: 60, tools: { weather }, toolChoice: "required",
  });
  found[name].calls = called.toolCalls.map((call) => [call.toolName, call.input]);
}
console.log(JSON.stringify(found));
