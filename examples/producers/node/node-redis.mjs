// Enqueues jobs with node-redis: node node-redis.mjs [count]
import { randomUUID } from "node:crypto";
import { createClient } from "@redis/client";

const count = Number(process.argv[2] ?? 10);
const queue = `queue:${process.env.QUEUE ?? "email-sending"}`;
const redis = createClient({ url: process.env.REDIS_URL });
redis.on("error", (error) => console.error(error.message));
await redis.connect();

await redis.lPush(queue, JSON.stringify({ payload: { to: "node-redis-0@example.com", subject: "Hello" } }));
await redis.lPush(
  `${queue}:low`,
  JSON.stringify({ id: randomUUID(), kind: "email.send", payload: { to: "node-redis-1@example.com" } }),
);
const jobs = [];
for (let n = 2; n < count; n++) jobs.push(JSON.stringify({ payload: { to: `node-redis-${n}@example.com` } }));
if (jobs.length) await redis.lPush(queue, jobs); // as many as you like in one command
await redis.close();
