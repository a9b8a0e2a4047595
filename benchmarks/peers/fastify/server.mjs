// The same routes on Node.js: Fastify with schemas both ways, jose, pg with prepared statements.
// `node server.mjs PORT verifying|cached`: verify the token of each request, or cache verified tokens.

import fastify from 'fastify'
import { createRemoteJWKSet, jwtVerify } from 'jose'
import pg from 'pg'

const [port, mode] = process.argv.slice(2)
const { DATABASE_URL, BETTER_AUTH_URL, BETTER_AUTH_JWKS_URL, PUBLIC_URL } = process.env

// A Date would be slower, and lose the microseconds that cursors need.
const TIMESTAMPTZ = 1184
pg.types.setTypeParser(TIMESTAMPTZ, (text) => text.replace(' ', 'T').replace('+00', 'Z'))
const database = new pg.Pool({ connectionString: DATABASE_URL, max: 10, options: '-c TimeZone=UTC' })
const COLUMNS = `id, title, description, status, priority, due_at, '{}'::text[] AS tags,
  coalesce(due_at < now() AND status <> 'done', false) AS is_overdue,
  completed_at, created_at, updated_at, deleted_at, version`
const ORDER = 'ORDER BY created_at DESC, id DESC'

const statement = (name, text) => async (values) => (await database.query({ name, text, values })).rows
const listFirst = statement(
  'first',
  `SELECT ${COLUMNS} FROM tasks WHERE owner_id = $1 AND deleted_at IS NULL ${ORDER} LIMIT $2`,
)
const listAfter = statement(
  'after',
  `SELECT ${COLUMNS} FROM tasks WHERE owner_id = $1 AND deleted_at IS NULL
   AND (created_at, id) < ($3::timestamptz, $4::uuid) ${ORDER} LIMIT $2`,
)
const get = statement(
  'get',
  `SELECT ${COLUMNS} FROM tasks WHERE owner_id = $1 AND id = $2 AND deleted_at IS NULL`,
)
const create = statement(
  'create',
  `INSERT INTO tasks (owner_id, title, description, status, priority, due_at, completed_at)
   VALUES ($1, $2, $3, $4, $5, $6, CASE WHEN $4 = 'done' THEN now() END) RETURNING ${COLUMNS}`,
)
const findUser = statement('find', 'SELECT id FROM users WHERE issuer = $1 AND subject = $2')
const makeUser = statement(
  'make',
  'INSERT INTO users (issuer, subject, email, name) VALUES ($1, $2, $3, $4) RETURNING id',
)

/** Cache the results of `find` for some seconds; beyond `size` entries the oldest is evicted. */
function cached(size, seconds, find) {
  const known = new Map()
  return async (key, ...rest) => {
    const found = known.get(key)
    if (found && found.until > Date.now()) return found.value
    const value = await find(key, ...rest)
    known.delete(key)
    known.set(key, { value, until: Date.now() + seconds * 1000 })
    if (known.size > size) known.delete(known.keys().next().value)
    return value
  }
}

const keys = createRemoteJWKSet(new URL(BETTER_AUTH_JWKS_URL))
const verify = async (token) =>
  (await jwtVerify(token, keys, { algorithms: ['EdDSA'], issuer: BETTER_AUTH_URL, audience: PUBLIC_URL })).payload
const claimsOf = mode === 'cached' ? cached(4096, 300, verify) : verify
const userOf = cached(10_000, 60, async (subject, { iss, email, name }) => {
  const [user] = await findUser([iss, subject])
  return (user ?? (await makeUser([iss, subject, email, name]))[0]).id
})

const text = { type: 'string' }
const nullable = { type: ['string', 'null'] }
const STATUS = { type: 'string', enum: ['todo', 'in_progress', 'done'], default: 'todo' }
const PRIORITY = { type: 'string', enum: ['low', 'normal', 'high', 'urgent'], default: 'normal' }
const task = {
  type: 'object',
  properties: {
    id: text,
    title: text,
    description: nullable,
    status: text,
    priority: text,
    due_at: nullable,
    tags: { type: 'array', items: text },
    is_overdue: { type: 'boolean' },
    completed_at: nullable,
    created_at: text,
    updated_at: text,
    deleted_at: nullable,
    version: { type: 'integer' },
  },
}
const page = { type: 'object', properties: { items: { type: 'array', items: task }, next_cursor: nullable } }
const id = { type: 'object', properties: { id: { type: 'string', format: 'uuid' } } }
const query = {
  type: 'object',
  properties: { limit: { type: 'integer', minimum: 1, maximum: 100, default: 20 }, cursor: text },
}
const body = {
  type: 'object',
  required: ['title'],
  additionalProperties: false,
  properties: {
    title: { type: 'string', minLength: 1, maxLength: 200 },
    description: { type: ['string', 'null'], maxLength: 10_000 },
    status: STATUS,
    priority: PRIORITY,
    due_at: { type: ['string', 'null'], format: 'date-time' },
  },
}

const app = fastify()
app.decorateRequest('user', null)
app.addHook('onRequest', async (request, reply) => {
  const [scheme, token] = (request.headers.authorization ?? '').split(' ')
  try {
    if (scheme !== 'Bearer' || !token) throw new Error('no token')
    const claims = await claimsOf(token)
    if (claims.exp <= Date.now() / 1000) throw new Error('expired since')
    request.user = await userOf(claims.sub, claims)
  } catch {
    return reply.code(401).header('WWW-Authenticate', 'Bearer').send({ detail: 'Not authenticated' })
  }
})

app.get('/api/v1/tasks', { schema: { querystring: query, response: { 200: page } } }, async (request) => {
  const { limit, cursor } = request.query
  const after = cursor ? Buffer.from(cursor, 'base64url').toString().split(' ') : []
  const tasks = await (cursor ? listAfter : listFirst)([request.user, limit + 1, ...after])
  const last = tasks.length > limit ? tasks[limit - 1] : null
  const next_cursor = last && Buffer.from(`${last.created_at} ${last.id}`).toString('base64url')
  return { items: tasks.slice(0, limit), next_cursor }
})

app.get('/api/v1/tasks/:id', { schema: { params: id, response: { 200: task } } }, async (request, reply) => {
  const [found] = await get([request.user, request.params.id])
  return found ?? reply.code(404).send({ detail: 'Task not found' })
})

app.post('/api/v1/tasks', { schema: { body, response: { 201: task } } }, async (request, reply) => {
  const { title, description = null, status, priority, due_at = null } = request.body
  const [made] = await create([request.user, title, description, status, priority, due_at])
  return reply.code(201).send(made)
})

await app.listen({ host: '127.0.0.1', port: Number(port) })
