// Enqueues jobs with ioredis: node ioredis.mjs [count]
import { randomUUID } from "node:crypto";
import { Redis } from "ioredis";

const count = Number(process.argv[2] ?? 10);
const queue = `queue:${process.env.QUEUE ?? "email-sending"}`;
// A push that is sent again after a lost reply is a second job, unless the two have the same id.
const redis = new Redis(process.env.REDIS_URL, { maxRetriesPerRequest: 0, autoResendUnfulfilledCommands: false });

await redis.lpush(queue, JSON.stringify({ payload: { to: "ioredis-0@example.com", subject: "Hello" } }));
await redis.lpush(
  `${queue}:high`,
  JSON.stringify({ id: randomUUID(), kind: "email.send", payload: { to: "ioredis-1@example.com" } }),
);
const pipeline = redis.pipeline();
for (let n = 2; n < count; n++) {
  pipeline.lpush(queue, JSON.stringify({ payload: { to: `ioredis-${n}@example.com` } }));
}
for (const [error] of (await pipeline.exec()) ?? []) if (error) throw error;
await redis.quit();
