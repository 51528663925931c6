-- Flows: graphs of jobs. A node whose predecessors have not ended is a job with the status blocked, which no relay looks at. The
-- end of a node and the release of its successors are one commit, by a trigger on the job's row, so that every way a job
-- ends counts. Jobs in no flow have no node, and the trigger's condition is all that they pay. Only locks that last for a
-- moment: rows are not read here, and the next migration checks them.

set local lock_timeout = '10s';
alter table streamworker.jobs
  add column node bigint, -- of flow_nodes; null: in no flow
  drop constraint jobs_status_check,
  add constraint jobs_status_check check (status in ('blocked', 'queued', 'dispatching', 'dispatched', 'running', 'retrying',
    'waiting', 'completed', 'dead', 'cancelled', 'expired')) not valid;

create table streamworker.flows (
  id text primary key,
  name text not null,
  key text,                             -- of the flows of one name and key, one is not cancelled
  status text not null default 'running' check (status in ('running', 'completed', 'failed', 'cancelled')),
  created_at timestamptz not null default clock_timestamp(),
  finished_at timestamptz               -- when the last node ended
);
create unique index flows_key on streamworker.flows (name, key) where key is not null and status <> 'cancelled';
create index flows_created on streamworker.flows (created_at, id);
create index flows_finished on streamworker.flows (finished_at) where finished_at is not null;

create sequence streamworker.node_numbers;

-- A node is a job, or the gate of a flow: what ends when all of that flow has ended. The gate of the flow itself has no gate.
create table streamworker.flow_nodes (
  node bigint primary key,
  flow_id text not null,
  gate bigint,                          -- of the (nested) flow that this node is part of
  name text not null,
  job_id text,                          -- null: a gate
  queue_name text,
  if_failed text not null default 'fail' check (if_failed in ('fail', 'skip', 'hold')),
  edges integer not null default 0,     -- to this node, when it was made
  outcome text check (outcome in ('ok', 'failed', 'skipped', 'held')), -- null: it has not ended
  unrun boolean not null default false, -- the flow ended it, and it never ran
  looked bigint not null default 0,     -- predecessors up to this one have ended
  delay double precision,               -- seconds from its release
  expires_in double precision
) with (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
create index flow_nodes_flow on streamworker.flow_nodes (flow_id, node);

create table streamworker.flow_edges (
  node bigint not null,
  after bigint not null,
  condition text not null check (condition in ('ok', 'failed', 'always', 'end')), -- end: to a gate
  primary key (node, after)
);
create index flow_edges_after on streamworker.flow_edges (after);

-- Nodes at which a relay looks after the commit: an end that saw others open cannot know whether they end meanwhile.
create table streamworker.flow_checks (
  id bigint generated always as identity primary key,
  node bigint not null
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
create index flow_checks_node on streamworker.flow_checks (node);

-- Who may use the jobs may use the flows.
do $$
declare
  given record;
begin
  for given in
    select distinct case grantee when 0 then 'public' else grantee::regrole::text end as role, privilege_type as right
    from pg_class, aclexplode(relacl) where oid = 'streamworker.jobs'::regclass and grantee <> relowner
      and privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
  loop
    execute format('grant %s on streamworker.flows, streamworker.flow_nodes, streamworker.flow_edges, streamworker.flow_checks to %s',
      given.right, given.role);
    execute format('grant usage on sequence streamworker.node_numbers to %s', given.role);
  end loop;
end
$$;

-- How one edge stands: met, unmet (its node does not run), failing (its node fails), or null, which is open.
--   condition   of the edge
--   outcome     of the node that the edge comes from
--   if_failed   of that node: what its failure means to those after it
create function streamworker.edge_state(condition text, outcome text, if_failed text) returns text
language sql immutable parallel safe as $$
  select case
    when outcome is null then null
    when condition = 'always' then 'met'
    when condition = 'end' then case when outcome <> 'held' then 'met' end
    when condition = 'failed' then case when outcome in ('failed', 'held') then 'met' else 'unmet' end
    when outcome = 'ok' then 'met'
    when outcome = 'skipped' then 'unmet'
    when outcome = 'failed' then case when if_failed = 'skip' then 'unmet' else 'failing' end
  end
$$;

-- Have a relay look at a node after the commit; once in a transaction for the node that was named last. Commits that notify
-- wait for each other, so a relay that was told of this node before, and looks again after each look that found something,
-- is not told again.
create function streamworker.flow_check(which bigint) returns void language plpgsql volatile as $$
begin
  if current_setting('streamworker.flow_check', true) is distinct from which::text then
    if not exists (select from streamworker.flow_checks where node = which) then
      perform pg_notify('streamworker', 'flows');
    end if;
    insert into streamworker.flow_checks (node) values (which);
    perform set_config('streamworker.flow_check', which::text, true);
  end if;
end
$$;

-- Decide on a node: release it if all edges to it are met, end it unrun if one is not, leave it if one is open. Returns the
-- outcome of a node that ended. A node on which another transaction decides is not waited for: the relay looks at it later.
--   tell   wake a relay for that
create function streamworker.flow_decide(which bigint, tell boolean default true) returns text language plpgsql volatile as $$
declare
  it streamworker.flow_nodes;
  found_open bigint;
  verdict text;
begin
  select * into it from streamworker.flow_nodes where node = which and outcome is null;
  if not found then
    return null;
  end if;
  -- The job's row first, then the node's, as every change of the job does.
  if it.job_id is not null then
    perform from streamworker.jobs as job
      where job.id = it.job_id and job.queue_name = it.queue_name and job.status = 'blocked' for update skip locked;
    if not found and not exists (
      select from streamworker.jobs as job
      where job.id = it.job_id and job.queue_name = it.queue_name and job.status = 'blocked'
    ) then
      return null;
    end if;
  else
    perform from streamworker.flow_nodes where node = which and outcome is null for update skip locked;
  end if;
  if not found then
    if tell then
      perform streamworker.flow_check(which);
    else
      insert into streamworker.flow_checks (node) values (which);
    end if;
    return null;
  end if;
  -- What was committed before the lock is seen from here on.
  if it.edges > 100 then
    select edge.after into found_open from streamworker.flow_edges as edge
      join streamworker.flow_nodes as before on before.node = edge.after
      where edge.node = which and edge.after > it.looked
        and streamworker.edge_state(edge.condition, before.outcome, before.if_failed) is null
      order by edge.after limit 1;
    if found then
      if found_open > it.looked + 1 then
        update streamworker.flow_nodes set looked = found_open - 1 where node = which;
      end if;
      return null;
    end if;
  end if;
  select case when bool_or(state is null) then null when bool_or(state = 'failing') then 'failed'
      when bool_or(state = 'unmet') then 'skipped' else 'ok' end into verdict
    from (
      select streamworker.edge_state(edge.condition, before.outcome, before.if_failed) as state
      from streamworker.flow_edges as edge join streamworker.flow_nodes as before on before.node = edge.after
      where edge.node = which
    ) as edges;
  if verdict is null then
    return null;
  end if;
  if it.job_id is null then
    select case when bool_or(part.outcome in ('failed', 'held') and part.if_failed <> 'skip') then 'failed'
        when bool_and(part.outcome = 'skipped') then 'skipped' else 'ok' end into verdict
      from streamworker.flow_nodes as part where part.flow_id = it.flow_id and part.gate = which;
    if verdict = 'failed' and it.if_failed = 'hold' then
      verdict := 'held';
    end if;
    update streamworker.flow_nodes set outcome = verdict where node = which;
    if it.gate is null then
      update streamworker.flows set finished_at = clock_timestamp(),
          status = case when status = 'cancelled' then status when verdict = 'failed' then 'failed' else 'completed' end
        where id = it.flow_id;
    end if;
    return verdict;
  end if;
  if verdict = 'ok' then
    update streamworker.jobs as job set status = 'queued', updated_at = clock_timestamp(),
        run_at = case when it.delay is null then job.run_at else clock_timestamp() + make_interval(secs => it.delay) end,
        expires_at = case when it.expires_in is null then job.expires_at
          else clock_timestamp() + make_interval(secs => it.expires_in) end,
        place = case when job.order_key is not null then streamworker.take_place(job.queue_name, job.order_key) end
      where job.id = it.job_id and job.queue_name = it.queue_name;
    perform pg_notify('streamworker', case when it.delay > 0 then 'later' else '' end);
    return null;
  end if;
  update streamworker.flow_nodes set outcome = verdict, unrun = true where node = which;
  update streamworker.jobs as job set status = 'cancelled', finished_at = clock_timestamp(), updated_at = clock_timestamp(),
      last_error = case verdict when 'failed' then 'not run: a job before it in its flow failed'
        else 'not run: the flow did not come this way' end
    where job.id = it.job_id and job.queue_name = it.queue_name;
  return verdict;
end
$$;

-- Decide on those that come after nodes that have just ended, and so on. At a node that waits for more than a hundred the
-- relay looks, once for all that ended meanwhile; and so it does where this transaction's snapshot is an old one.
create function streamworker.flow_go_on(ended bigint[]) returns void language plpgsql volatile as $$
declare
  wave bigint[] := ended;
  next bigint[];
  it record;
begin
  while cardinality(wave) > 0 loop
    next := '{}';
    for it in
      select distinct successor.node, successor.edges from streamworker.flow_edges as edge
        join streamworker.flow_nodes as successor on successor.node = edge.node
        where edge.after = any(wave) and successor.outcome is null order by successor.node
    loop
      if it.edges > 100 or current_setting('transaction_isolation') <> 'read committed' then
        perform streamworker.flow_check(it.node);
      elsif streamworker.flow_decide(it.node) is not null then
        next := next || it.node;
      elsif it.edges > 1 then
        perform streamworker.flow_check(it.node) from streamworker.flow_nodes as node
          left join streamworker.jobs as job on job.id = node.job_id and job.queue_name = node.queue_name
          where node.node = it.node and node.outcome is null and (node.job_id is null or job.status = 'blocked');
      end if;
    end loop;
    wave := next;
  end loop;
end
$$;

-- Look at nodes that transactions have left to look at. Returns how many there were.
create function streamworker.flow_look(most integer) returns integer language plpgsql volatile
set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  nodes bigint[];
  it bigint;
  verdict text;
begin
  with taken as (
    delete from streamworker.flow_checks
    where id in (select id from streamworker.flow_checks order by id limit flow_look.most for update skip locked)
    returning node
  )
  select array_agg(distinct node order by node) into nodes from taken;
  if nodes is null then
    return 0;
  end if;
  foreach it in array nodes loop
    if streamworker.flow_decide(it, false) is not null then
      perform streamworker.flow_go_on(array[it]);
    end if;
  end loop;
  return cardinality(nodes);
end
$$;

-- A node that had ended goes on: what its end has decided and what never ran is open again.
create function streamworker.flow_reopen(which bigint) returns void language plpgsql volatile as $$
declare
  wave bigint[] := array[which];
  next bigint[];
begin
  while cardinality(wave) > 0 loop
    update streamworker.flow_nodes as node set looked = 0 from streamworker.flow_edges as edge
      where edge.after = any(wave) and node.node = edge.node and node.looked > 0;
    select array_agg(distinct node.node order by node.node) into next from streamworker.flow_edges as edge
      join streamworker.flow_nodes as node on node.node = edge.node
      where edge.after = any(wave) and node.outcome is not null and (node.unrun or node.job_id is null);
    exit when next is null;
    update streamworker.flows as flow set status = 'running', finished_at = null from streamworker.flow_nodes as node
      where node.node = any(next) and node.job_id is null and node.gate is null and flow.id = node.flow_id
        and flow.status in ('completed', 'failed');
    update streamworker.jobs as job set status = 'blocked', finished_at = null, last_error = null, updated_at = clock_timestamp()
      from streamworker.flow_nodes as node
      where node.node = any(next) and node.unrun and job.id = node.job_id and job.queue_name = node.queue_name
        and job.status = 'cancelled';
    update streamworker.flow_nodes set outcome = null, unrun = false, looked = 0 where node = any(next);
    wave := next;
  end loop;
end
$$;

create function streamworker.node_changed() returns trigger language plpgsql as $$
declare
  it streamworker.flow_nodes;
  now_is text;
begin
  select * into it from streamworker.flow_nodes where node = new.node;
  if not found or it.unrun and new.status = 'cancelled' then
    return null; -- the flow was deleted, or has ended this node itself
  end if;
  now_is := case new.status when 'completed' then 'ok' when 'cancelled' then 'failed' when 'expired' then 'failed'
    when 'dead' then case it.if_failed when 'hold' then 'held' else 'failed' end end;
  if it.outcome is not distinct from now_is then
    return null;
  end if;
  if it.outcome is not null then
    perform streamworker.flow_reopen(new.node);
  end if;
  update streamworker.flow_nodes set outcome = now_is, unrun = false where node = new.node;
  if now_is is not null then
    perform streamworker.flow_go_on(array[new.node]);
  end if;
  return null;
end
$$;
create trigger jobs_node_changed after update of status on streamworker.jobs for each row
  when (new.node is not null and old.status is distinct from new.status and new.status <> 'blocked' and (
    new.status in ('completed', 'dead', 'cancelled', 'expired') or old.status in ('completed', 'dead', 'cancelled', 'expired')))
  execute function streamworker.node_changed();

-- A job that is deleted ends its node, if it has not ended: nothing of it will run.
create function streamworker.node_deleted() returns trigger language plpgsql as $$
begin
  update streamworker.flow_nodes set outcome = 'failed', unrun = true where node = old.node and outcome is null;
  if found then
    perform streamworker.flow_go_on(array[old.node]);
  end if;
  return null;
end
$$;
create trigger jobs_node_deleted after delete on streamworker.jobs for each row
  when (old.node is not null) execute function streamworker.node_deleted();

-- Cancel a flow: what has not begun never runs, and nothing is released any more. Returns (queue, id) of the jobs that may be
-- in Redis, for which the caller sets a mark there.
create function streamworker.cancel_flow(flow text) returns table (queue_name text, id text) language plpgsql volatile as $$
#variable_conflict use_column
begin
  -- Waits for transactions that add nodes.
  perform from streamworker.flows as it where it.id = cancel_flow.flow and it.finished_at is null for update;
  if not found then
    return;
  end if;
  update streamworker.flows as it set status = 'cancelled' where it.id = cancel_flow.flow;
  perform from streamworker.jobs as job join streamworker.flow_nodes as node
      on node.job_id = job.id and node.queue_name = job.queue_name
    where node.flow_id = cancel_flow.flow and job.status = 'blocked' order by job.id, job.queue_name for update of job;
  with nodes as (
    update streamworker.flow_nodes as node set outcome = 'skipped', unrun = true from streamworker.jobs as job
      where node.flow_id = cancel_flow.flow and node.outcome is null and job.id = node.job_id
        and job.queue_name = node.queue_name and job.status = 'blocked'
      returning job.id, job.queue_name
  )
  update streamworker.jobs as job set status = 'cancelled', finished_at = clock_timestamp(), updated_at = clock_timestamp(),
      last_error = 'not run: its flow was cancelled'
    from nodes where job.id = nodes.id and job.queue_name = nodes.queue_name and job.status = 'blocked';
  -- What still runs has nothing behind it any more that its flow would wait for.
  insert into streamworker.flow_edges (node, after, condition)
    select node.gate, node.node, 'end' from streamworker.flow_nodes as node
      where node.flow_id = cancel_flow.flow and node.outcome is null and node.gate is not null
    on conflict do nothing;
  -- Blocked jobs alone cannot settle the gates: look at them, whatever ended before.
  perform streamworker.flow_check(node.node) from streamworker.flow_nodes as node
    where node.flow_id = cancel_flow.flow and node.job_id is null and node.outcome is null;
  perform from streamworker.jobs as job join streamworker.flow_nodes as node
      on node.job_id = job.id and node.queue_name = job.queue_name
    where node.flow_id = cancel_flow.flow and job.status in ('queued', 'dispatching', 'dispatched', 'retrying', 'waiting')
    order by job.id, job.queue_name for update of job;
  update streamworker.jobs as job set status = 'cancelled', finished_at = clock_timestamp(), updated_at = clock_timestamp(),
      waits_for = null
    from streamworker.flow_nodes as node
    where node.flow_id = cancel_flow.flow and job.id = node.job_id and job.queue_name = node.queue_name
      and job.status in ('queued', 'dispatching', 'dispatched', 'retrying', 'waiting');
  return query select job.queue_name, job.id from streamworker.jobs as job join streamworker.flow_nodes as node
      on node.job_id = job.id and node.queue_name = job.queue_name
    where node.flow_id = cancel_flow.flow and (job.status = 'running' or job.hop > 0 and job.status = 'cancelled')
      and (node.outcome is null or not node.unrun);
end
$$;

-- Queue the dead, expired and cancelled jobs of a flow anew, with all their attempts; what never ran for their sake goes on after
-- them. Returns how many there were.
create function streamworker.retry_flow(flow text) returns integer language plpgsql volatile as $$
declare
  again bigint[];
begin
  perform from streamworker.flows as it where it.id = retry_flow.flow for update;
  select array_agg(node.node order by job.id, job.queue_name) into again from streamworker.flow_nodes as node
    join streamworker.jobs as job on job.id = node.job_id and job.queue_name = node.queue_name
    where node.flow_id = retry_flow.flow and job.status in ('dead', 'cancelled', 'expired') and not node.unrun
      and node.outcome is not null;
  if again is null and not exists (
    select from streamworker.flows as it where it.id = retry_flow.flow and it.status = 'cancelled'
  ) then
    return 0;
  end if;
  update streamworker.flows as it set status = 'running', finished_at = null
    where it.id = retry_flow.flow and it.status in ('cancelled', 'failed');
  -- What a cancelled flow has not run is open again, too.
  with opened as (
    update streamworker.flow_nodes as node set outcome = null, unrun = false, looked = 0
      where node.flow_id = retry_flow.flow and (node.unrun or node.job_id is null and node.outcome is not null)
      returning node.node, node.job_id, node.queue_name
  )
  update streamworker.jobs as job set status = 'blocked', finished_at = null, last_error = null, updated_at = clock_timestamp()
    from opened where job.id = opened.job_id and job.queue_name = opened.queue_name and job.status = 'cancelled';
  update streamworker.jobs as job set status = 'queued', attempt_count = 0, hop = job.hop + 1, deliveries = 0, run_at = null,
      expires_at = null, worker_id = null, started_at = null, finished_at = null, last_error = null, result = null,
      updated_at = clock_timestamp()
    where job.node = any(again) and (job.id, job.queue_name) in (
      select node.job_id, node.queue_name from streamworker.flow_nodes as node where node.node = any(again)
    );
  perform streamworker.flow_check(node.node) from streamworker.flow_nodes as node
    where node.flow_id = retry_flow.flow and node.outcome is null;
  perform pg_notify('streamworker', '');
  return coalesce(cardinality(again), 0);
end
$$;

-- Delete a flow and its jobs; false if one of them has not ended.
create function streamworker.delete_flow(flow text) returns boolean language plpgsql volatile as $$
begin
  perform from streamworker.flows as it where it.id = delete_flow.flow and it.finished_at is not null for update;
  if not found then
    return false;
  end if;
  delete from streamworker.flow_edges as edge using streamworker.flow_nodes as node
    where node.flow_id = delete_flow.flow and edge.node = node.node;
  with nodes as (
    delete from streamworker.flow_nodes as node where node.flow_id = delete_flow.flow returning node.job_id, node.queue_name
  ), gone as (
    delete from streamworker.jobs as job using nodes where job.id = nodes.job_id and job.queue_name = nodes.queue_name
      returning job.id, job.queue_name
  ), steps as (
    delete from streamworker.job_steps as step using gone
      where step.job_id = gone.id and step.queue_name = gone.queue_name
  ), signals as (
    delete from streamworker.job_signals as signal using gone
      where signal.job_id = gone.id and signal.queue_name = gone.queue_name
  )
  delete from streamworker.job_logs as log using gone
    where log.job_id = gone.id and log.queue_name in (gone.queue_name, '');
  delete from streamworker.flows as it where it.id = delete_flow.flow;
  return true;
end
$$;
