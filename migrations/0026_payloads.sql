-- Payloads that are too large for a document (STREAMWORKER_OFFLOAD_BYTES): the job has {"streamworker_stored": {...}} in their
-- place. Only a new table, and a function.

create table streamworker.payloads (
  id text primary key,
  namespace text not null default '',
  data bytea not null,
  made_at timestamptz not null default now(),
  used_at timestamptz not null default now() -- written, read (noted once an hour), or found in a job by the relay's sweep
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
create index payloads_used on streamworker.payloads (namespace, used_at);

-- Store a payload, and return what a job has in its place:
-- select streamworker.enqueue('export', streamworker.store_payload('{"rows": [...]}'), 'exports')
create function streamworker.store_payload(payload jsonb, namespace text default '') returns jsonb language plpgsql volatile as $$
declare
  data bytea := convert_to(store_payload.payload::text, 'UTF8');
  name text := streamworker.new_id();
begin
  if jsonb_typeof(store_payload.payload) is distinct from 'object' then
    raise exception 'the payload must be a JSON object' using errcode = 'invalid_parameter_value';
  end if;
  insert into streamworker.payloads (id, namespace, data) values (name, store_payload.namespace, data);
  return jsonb_build_object('streamworker_stored',
    jsonb_build_object('id', name, 'sha256', encode(sha256(data), 'hex'), 'size', octet_length(data)));
end
$$;
