// DATABASE_URL=postgresql://… node postgres.mjs 10
// A row and its job, in one transaction: both are stored, or neither.
import pg from "pg";

const count = Number(process.argv[2] ?? 10);
const client = new pg.Client({ connectionString: process.env.DATABASE_URL });
await client.connect();
await client.query("create table if not exists orders (id text primary key)");

async function order(id, to) {
  await client.query("insert into orders values ($1)", [id]);
  // Named arguments: priority, run_at, key, key_ttl, headers, max_attempts and id may be given beside these.
  const { rows } = await client.query(
    "select streamworker.enqueue(kind => 'email.send', payload => $1, queue => 'email-sending', key => $2) as job",
    [{ to }, id],
  );
  return rows[0].job;
}

for (let n = 0; n < count; n += 1) {
  await client.query("begin");
  try {
    await order(`node-pg-${n}`, `node-pg-${n}@example.com`);
    await client.query("commit");
  } catch (error) {
    await client.query("rollback");
    throw error;
  }
}

// Rolled back: no row, no job.
await client.query("begin");
await order("node-pg-never", "never@example.com");
await client.query("rollback");
await client.end();
